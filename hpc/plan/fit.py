"""What to change when a training stage has run out of memory: the micro-batch that the plan says would fit."""

from hpc.config import Machine, RunConfig, TrainingBase, Trains
from hpc.plan.facts import Facts, compute_precision, model_facts
from hpc.plan.memory import training_memory
from hpc.plan.quantity import GIB


def advice(config: RunConfig, machine: Machine, name: str) -> str:
    """Which batches.micro_batch_size fits the memory that the site states for a rank, or what else helps."""
    stage = config.stage(name)
    facts = model_facts(config, name)
    if facts is None or not isinstance(stage, Trains):
        return "lower batches.micro_batch_size or take more ranks"
    settings, offered = stage.train, machine.memory_gib_per_rank
    now = settings.batches.micro_batch_size
    needed = {size: planned_bytes(facts, settings, machine, size) / GIB for size in smaller(settings)}
    planned = planned_bytes(facts, settings, machine, now) / GIB
    if planned <= offered and needed:
        size = max(needed)
        return (
            f"the plan gives micro_batch_size = {now} {planned:.1f} GiB and the site offers {offered:g} GiB per rank, "
            f"so less is free than it states: set batches.micro_batch_size to {size} ({needed[size]:.1f} GiB)"
        )
    fitting = [size for size, gib in needed.items() if gib <= offered]
    if fitting:
        size = max(fitting)
        return (
            f"micro_batch_size = {now} needs about {planned:.1f} GiB of {offered:g} per rank: set "
            f"batches.micro_batch_size to {size} ({needed[size]:.1f} GiB)"
        )
    least = min(needed.values(), default=planned)
    return (
        f"no micro_batch_size fits {offered:g} GiB per rank (the smallest needs {least:.1f}): take more ranks, a "
        "larger parallel.expert_parallel_size, or parallel.zero_stage = 3"
    )


def smaller(settings: TrainingBase) -> list[int]:
    """Micro-batches below the present one with which tokens_per_step stays whole."""
    sequences = settings.batches.tokens_per_step // (settings.parallel.world_size * settings.batches.seq_len)
    return [size for size in range(1, settings.batches.micro_batch_size) if sequences % size == 0]


def planned_bytes(facts: Facts, settings: TrainingBase, machine: Machine, micro_batch_size: int) -> float:
    """What the plan gives a rank with another micro-batch."""
    batches = settings.batches.model_copy(update={"micro_batch_size": micro_batch_size})
    changed = settings.model_copy(update={"batches": batches})
    return training_memory(facts, changed, compute_precision(machine, settings), on_cpu=machine.device != "cuda").bytes
