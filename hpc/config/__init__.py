"""What a user may ask for: classes with a docstring under each field, loaded from YAML. Imports nothing heavy."""

from hpc.config.machine import Facility, Machine, PowerModel, Stated
from hpc.config.model import LatentAttention, Model, Router
from hpc.config.run import RunConfig, Tracking
from hpc.config.stages import Artifact, Evaluate, Lora, Merge, Prepare, Pretrain, Quantize, Report, Source, Stage
from hpc.config.train import AdapterTraining, Health, Optimizer, Parallel, Schedule, Training, TrainingBase

__all__ = [
    "AdapterTraining", "Artifact", "Evaluate", "Facility", "Health", "LatentAttention", "Lora", "Machine", "Merge",
    "Model", "Optimizer", "Parallel", "PowerModel", "Prepare", "Pretrain", "Quantize", "Report", "Router", "RunConfig",
    "Schedule", "Source", "Stage", "Stated", "Tracking", "Training", "TrainingBase",
]  # fmt: skip
