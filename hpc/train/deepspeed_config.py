"""What a training stage asks of DeepSpeed, as the dictionary that DeepSpeed reads."""

from typing import Any

from hpc.config import TrainingBase

REDUCE_BUCKET = 100_000_000
"""Gradients that are exchanged at a time; as many elements of memory, twice where exchange and backward overlap."""

PRESETS = {"olmoe": "qwen3_moe", "qwen2_moe": "qwen3_moe"}
"""transformers model type -> the layer shape that AutoEP knows, where its name differs: all have Qwen3-MoE's."""


def needs_autoep(settings: TrainingBase) -> bool:
    """Whether MoE blocks become DeepSpeed's: for expert parallelism, and for Muon, which has to see gate and up as the
    two matrices that they are."""
    return settings.parallel.expert_parallel_size > 1 or settings.optimizer.kind == "muon"


def deepspeed_config(
    settings: TrainingBase, precision: str, model_type: str, device: str, trained: int
) -> dict[str, Any]:
    """DeepSpeed's configuration for a training stage, with the user's overlay on top. trained: parameters to train, all
    experts counted; a bucket for more gradients than there are would only be memory."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.batches.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_clipping": settings.optimizer.gradient_clipping,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": settings.parallel.zero_stage,
            "overlap_comm": device == "cuda",
            "reduce_bucket_size": min(REDUCE_BUCKET, trained),
        },
    }
    if settings.optimizer.kind == "muon":
        config["gradient_clipping"] = 0.0  # DeepSpeed would clip the orthogonalised updates
        config["zero_optimization"]["reduce_scatter"] = settings.parallel.zero_stage < 3  # it asks for both
    if needs_autoep(settings):
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": settings.parallel.expert_parallel_size,
            "preset_model": PRESETS.get(model_type, model_type),
            "async_split_plan": device == "cuda" and settings.parallel.expert_parallel_size > 1,
        }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    return {**config, **settings.deepspeed}
