"""What a user may ask for: classes with a docstring under each field, loaded from YAML. Imports nothing heavy."""

from hpc.config.machine import Facility, Machine, PowerModel, Stated
from hpc.config.model import Balance, LatentAttention, Model, Router
from hpc.config.reuse import Init, Upcycle
from hpc.config.run import RunConfig, Tracking
from hpc.config.stages import (
    Artifact,
    Evaluate,
    Export,
    Finetune,
    Lora,
    Merge,
    Prepare,
    Pretrain,
    Quantize,
    Relora,
    Report,
    Reuse,
    Source,
    Stage,
    Trains,
)  # fmt: skip
from hpc.config.train import (
    AdapterTraining,
    ExpertChoice,
    Finetuning,
    Health,
    Optimizer,
    Parallel,
    ReloraTraining,
    Schedule,
    Training,
    TrainingBase,
)  # fmt: skip

__all__ = [
    "AdapterTraining", "Artifact", "Balance", "Evaluate", "ExpertChoice", "Export", "Facility", "Finetune",
    "Finetuning", "Health", "Init", "LatentAttention", "Lora", "Machine", "Merge", "Model", "Optimizer", "Parallel",
    "PowerModel", "Prepare", "Pretrain", "Quantize", "Relora", "ReloraTraining", "Report", "Reuse", "Router",
    "RunConfig", "Schedule", "Source", "Stage", "Stated", "Tracking", "Training", "TrainingBase", "Trains", "Upcycle",
]  # fmt: skip
