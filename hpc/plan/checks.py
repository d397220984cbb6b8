"""What a site or a model does not allow, said before anything starts."""

from hpc.config import Lora, Machine, Model, Quantize, Router, Stage, Trains
from hpc.errors import ConfigError
from hpc.plan.facts import Facts
from hpc.plan.memory import Memory
from hpc.plan.quantity import GIB


def check_stage(machine: Machine, stage: Stage, facts: Facts | None, nodes: int, ranks_per_node: int) -> None:
    """Ranks, context length, groups of weights. Raises ConfigError."""
    for setting, asked, offered in (
        ("nodes", nodes, machine.max_nodes),
        ("ranks_per_node", ranks_per_node, machine.ranks_per_node),
    ):
        if asked > offered:
            raise ConfigError(
                f"stage {stage.name!r}: parallel.{setting} = {asked}, but the site offers {offered}: choose at most "
                f"{offered}, or another --site"
            )
    if isinstance(stage, Trains) and facts:
        _check_experts(stage, facts.router)
    if isinstance(stage, Lora) and facts and stage.train.batches.seq_len > facts.seq_len:
        raise ConfigError(
            f"stage {stage.name!r}: seq_len {stage.train.batches.seq_len} is longer than the context of its model, "
            f"{facts.seq_len}: choose at most {facts.seq_len}"
        )
    if isinstance(stage, Quantize) and stage.format == "int" and facts:
        _check_groups(stage, facts.model)


def _check_experts(stage: Trains, router: Router) -> None:
    experts, group = router.num_experts, stage.train.parallel.expert_parallel_size
    if experts % group:
        what = f"does not divide its {experts} experts: choose a divisor of {experts}"
        if experts == 1:
            what = "is for mixtures of experts, and its model is dense: set it to 1, or upcycle the model"
        raise ConfigError(f"stage {stage.name!r}: parallel.expert_parallel_size = {group} {what}")


def check_memory(machine: Machine, stage: Stage, memory: Memory) -> None:
    """Raises ConfigError when a rank needs more than the site states."""
    if memory.bytes > machine.memory_gib_per_rank * GIB:
        raise ConfigError(
            f"stage {stage.name!r} needs about {memory.bytes / GIB:.1f} GiB per rank, the site offers "
            f"{machine.memory_gib_per_rank:g}: "
            "lower batches.micro_batch_size, or raise parallel.expert_parallel_size or nodes"
        )


def _check_groups(stage: Quantize, model: Model) -> None:
    for setting, size in (("hidden_size", model.hidden_size), ("expert_size", model.expert_size)):
        if size % stage.group_size:
            fits = [str(group) for group in (128, 64, 32) if size % group == 0]
            way_out = f"choose {' or '.join(fits)}" if fits else f"choose a {setting} that is a multiple of 32"
            raise ConfigError(
                f"stage {stage.name!r}: group_size {stage.group_size} does not divide {setting} {size}: {way_out}"
            )
