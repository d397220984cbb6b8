"""From a configuration and a machine to a plan: stages x resources, with memory, FLOPs, hours and watt-hours.

Every figure says how it was come by. Time is FLOPs over the machine's expected rate plus the start of processes;
energy is time x the power model of the site. Both are estimates, for a decision before a node-hour is spent.
"""

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hpc.config import (
    AdapterTraining,
    Evaluate,
    Lora,
    Machine,
    Model,
    Prepare,
    Pretrain,
    Quantize,
    Router,
    RunConfig,
    Stage,
    TrainingBase,
)
from hpc.config.stages import Tokenizer
from hpc.errors import ConfigError
from hpc.plan.budget import check_budgets
from hpc.plan.flops import adapter_flops_per_token, forward_flops_per_token, training_flops_per_token
from hpc.plan.memory import training_bytes_per_rank
from hpc.plan.params import Parameters, count, count_adapter

PREPARE_BYTES_PER_S = 2.5e6
"""Text through tokenizer training and encoding on two cores, measured on the quickstart's text."""
BYTES_PER_TOKEN = 4.4
"""English through a byte-level BPE of a few thousand entries, measured on the quickstart's text."""
QUANTIZE_PARAMETERS_PER_S = 1.0e6
"""Round-to-nearest on one core, measured on the quickstart's model."""


@dataclass(frozen=True)
class Quantity:
    """A figure with its unit and how it was come by; None when it cannot be known yet."""

    value: float | None
    unit: str
    how: str


@dataclass(frozen=True)
class StagePlan:
    """One stage as it will run."""

    name: str
    kind: str
    needs: tuple[str, ...]
    nodes: int
    ranks_per_node: int
    expert_parallel_size: int
    zero_stage: int | None
    precision: str | None
    steps: int | None
    tokens: int | None
    gradient_accumulation_steps: int | None
    total_params: int | None
    active_params: int | None
    trainable_params: int | None
    memory_per_rank: Quantity
    flops: Quantity
    time: Quantity
    energy: Quantity
    notes: tuple[str, ...] = ()
    deepspeed_overlay: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What will run."""

    run: str
    stages: tuple[StagePlan, ...]
    total_time: Quantity
    total_energy: Quantity
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for plan.json and `plan --json`."""
        return asdict(self)


@dataclass(frozen=True)
class Facts:
    """What is known about the model that a stage reads or makes."""

    model: Model
    router: Router
    parameters: Parameters
    vocab_size: int
    seq_len: int


def plan(config: RunConfig, machine: Machine) -> Plan:
    """Plan every stage in the order in which it can run. Raises ConfigError for what the machine does not offer."""
    facts: dict[str, Facts | None] = {}
    stages = []
    for stage in config.ordered():
        facts[stage.name] = _facts(config, stage, facts)
        stages.append(_plan_stage(config, machine, stage, facts[stage.name]))
    known = [stage for stage in stages if stage.time.value is not None]
    partly = "" if len(known) == len(stages) else f" of {len(known)} of {len(stages)} stages"
    return Plan(
        run=config.name,
        stages=tuple(stages),
        total_time=Quantity(sum(s.time.value or 0 for s in known), "s", f"estimated: sum{partly}"),
        total_energy=Quantity(sum(s.energy.value or 0 for s in known), "J", f"estimated: sum{partly}"),
        assumptions=(
            *check_budgets(config, {stage.name: stage.energy.value for stage in stages}),
            f"time: estimated, FLOPs / ({machine.peak_flops_per_rank:.3g} FLOP/s per rank x {machine.expected_mfu} "
            f"expected MFU) + {machine.stage_overhead_s:.0f} s to start a stage ({machine.source})",
            f"energy: estimated, time x power of the busy cores and memory of all ranks ({machine.power.source})",
            "FLOPs: derived, 6 x active matrix parameters + 12 L H T per token (arXiv:2204.02311, appendix B)",
            "memory: derived for weights and optimizer (arXiv:1910.02054), estimated for activations",
        ),
    )


def model_facts(config: RunConfig, name: str) -> Facts | None:
    """What is known about the model of a stage; None when it has none, or its size cannot be read here."""
    facts: dict[str, Facts | None] = {}
    for stage in config.ordered():
        facts[stage.name] = _facts(config, stage, facts)
    return facts[name]


def _facts(config: RunConfig, stage: Stage, facts: dict[str, Facts | None]) -> Facts | None:
    """The model of a stage: its own shape when it pretrains, else that of the first model or adapter it needs."""
    if isinstance(stage, Pretrain):
        vocab_size = _vocab_size(config, config.needed(stage, ["tokens"])[0])
        if vocab_size is None:
            return None
        training = stage.train
        parameters = count(training.model, training.router, vocab_size)
        return Facts(training.model, training.router, parameters, vocab_size, training.batches.seq_len)
    found = config.needed(stage, ["model", "adapter", "quantized"])
    return facts[found[0].name] if found else None


def _vocab_size(config: RunConfig, stage: Stage) -> int | None:
    """Vocabulary of a prepare stage; None when its tokenizer cannot be read here."""
    assert isinstance(stage, Prepare)
    if stage.needs:
        return _vocab_size(config, config.stage(stage.needs[0]))
    tokenizer = stage.tokenizer or Tokenizer()
    if tokenizer.path is None:
        return tokenizer.vocab_size
    try:
        content = json.loads((Path(tokenizer.path) / "tokenizer.json").read_text(encoding="utf-8"))
        return len(content["model"]["vocab"]) + sum(
            token["content"] not in content["model"]["vocab"] for token in content.get("added_tokens", [])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plan_stage(config: RunConfig, machine: Machine, stage: Stage, facts: Facts | None) -> StagePlan:
    settings: TrainingBase | None = stage.train if isinstance(stage, (Pretrain, Lora)) else None
    nodes = settings.parallel.nodes if settings else 1
    ranks_per_node = settings.parallel.ranks_per_node if settings else 1
    _check_resources(machine, stage, nodes, ranks_per_node)
    precision = compute_precision(machine, settings) if settings else None
    flops, tokens, notes = _work(config, stage, facts)
    memory = _memory(facts, settings, precision)
    if memory.value is not None and memory.value > machine.memory_gib_per_rank * 2**30:
        raise ConfigError(
            f"stage {stage.name!r} needs about {memory.value / 2**30:.1f} GiB per rank, the site offers "
            f"{machine.memory_gib_per_rank:g}: "
            "lower batches.micro_batch_size, or raise parallel.expert_parallel_size or nodes"
        )
    if isinstance(stage, Lora) and facts and stage.train.batches.seq_len > facts.seq_len:
        raise ConfigError(
            f"stage {stage.name!r}: seq_len {stage.train.batches.seq_len} is longer than the context of its model, "
            f"{facts.seq_len}: choose at most {facts.seq_len}"
        )
    if isinstance(stage, Quantize) and facts:
        _check_groups(stage, facts.model)
    seconds = _seconds(machine, stage, flops, nodes * ranks_per_node, facts)
    trainable = None
    if facts and isinstance(stage, Lora):
        trainable = count_adapter(facts.model, facts.router, stage.train)
    elif facts and isinstance(stage, Pretrain):
        trainable = facts.parameters.total
    return StagePlan(
        name=stage.name,
        kind=stage.kind,
        needs=tuple(stage.needs),
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        expert_parallel_size=settings.parallel.expert_parallel_size if settings else 1,
        zero_stage=settings.parallel.zero_stage if settings else None,
        precision=precision,
        steps=settings.steps if settings else None,
        tokens=tokens,
        gradient_accumulation_steps=settings.gradient_accumulation_steps if settings else None,
        total_params=facts.parameters.total if facts else None,
        active_params=facts.parameters.active if facts else None,
        trainable_params=trainable,
        memory_per_rank=memory,
        flops=flops,
        time=seconds,
        energy=_energy(machine, seconds, nodes, ranks_per_node),
        notes=notes,
        deepspeed_overlay=settings.deepspeed if settings else {},
    )


def _check_resources(machine: Machine, stage: Stage, nodes: int, ranks_per_node: int) -> None:
    for setting, asked, offered in (
        ("nodes", nodes, machine.max_nodes),
        ("ranks_per_node", ranks_per_node, machine.ranks_per_node),
    ):
        if asked > offered:
            raise ConfigError(
                f"stage {stage.name!r}: parallel.{setting} = {asked}, but the site offers {offered}: choose at most "
                f"{offered}, or another --site"
            )


def _check_groups(stage: Quantize, model: Model) -> None:
    for setting, size in (("hidden_size", model.hidden_size), ("expert_size", model.expert_size)):
        if size % stage.group_size:
            fits = [str(group) for group in (128, 64, 32) if size % group == 0]
            way_out = f"choose {' or '.join(fits)}" if fits else f"choose a {setting} that is a multiple of 32"
            raise ConfigError(
                f"stage {stage.name!r}: group_size {stage.group_size} does not divide {setting} {size}: {way_out}"
            )


def compute_precision(machine: Machine, settings: TrainingBase) -> str:
    """fp32 or bf16, as far as it can be told before the run."""
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if machine.device == "cuda" else "fp32"


def _work(config: RunConfig, stage: Stage, facts: Facts | None) -> tuple[Quantity, int | None, tuple[str, ...]]:
    """FLOPs and tokens of a stage."""
    if isinstance(stage, Prepare):
        return Quantity(0.0, "FLOP", "derived: none to speak of"), None, ()
    if facts is None:
        return Quantity(None, "FLOP", "unknown: the model's size is not known yet"), None, ()
    shape = (facts.model, facts.router, facts.vocab_size)
    if isinstance(stage, (Pretrain, Lora)):
        tokens = stage.train.steps * stage.train.batches.tokens_per_step
        seq_len = stage.train.batches.seq_len
        per_token = (
            adapter_flops_per_token(*shape, seq_len, stage.train)
            if isinstance(stage.train, AdapterTraining)
            else training_flops_per_token(*shape, seq_len)
        )
        notes = tuple(_epochs(stage.train, tokens, config.needed(stage, ["tokens"])))
        return Quantity(tokens * per_token, "FLOP", "derived: tokens x FLOPs per token"), tokens, notes
    if isinstance(stage, Evaluate):
        held_out = [_held_out_tokens(source, stage.tokens) for source in config.needed(stage, ["tokens"])]
        known = [tokens for tokens in held_out if tokens is not None]
        if len(known) < len(held_out):
            return Quantity(None, "FLOP", "unknown: the held-out text is not here"), None, ()
        tokens = sum(known) * len(config.needed(stage, ["model", "quantized"]))
        flops = tokens * forward_flops_per_token(*shape, facts.seq_len)
        return Quantity(flops, "FLOP", "estimated: forward passes over text at 4.4 bytes a token"), tokens, ()
    return Quantity(0.0, "FLOP", "derived: none to speak of"), None, ()


def _epochs(settings: TrainingBase, tokens: int, texts: list[Stage]) -> Iterator[str]:
    """How often a training stage goes through each of its texts."""
    weights = [settings.mixture.get(text.name, 1.0) for text in texts]
    for text, weight in zip(texts, weights, strict=True):
        size = _text_bytes(text)
        if size is not None:
            share = weight / sum(weights)
            of = "its text" if len(texts) == 1 else text.name
            yield f"about {share * tokens / (size / BYTES_PER_TOKEN):.2f} epochs of {of} (estimated)"


def _memory(facts: Facts | None, settings: TrainingBase | None, precision: str | None) -> Quantity:
    if facts is None:
        return Quantity(None, "B", "unknown: no model, or its size is not known yet")
    if settings is None or precision is None:
        return Quantity(4.0 * facts.parameters.total, "B", "derived: fp32 weights")
    value = training_bytes_per_rank(facts.model, facts.router, facts.parameters, settings, precision)
    return Quantity(value, "B", "derived: weights and optimizer states; estimated: activations")


def _seconds(machine: Machine, stage: Stage, flops: Quantity, ranks: int, facts: Facts | None) -> Quantity:
    if isinstance(stage, Prepare):
        text = _text_bytes(stage)
        if text is None:
            return Quantity(None, "s", "unknown: the text is not here")
        return Quantity(
            machine.stage_overhead_s / 4 + text / PREPARE_BYTES_PER_S, "s", "estimated: bytes of text / 2.5 MB/s"
        )
    if flops.value is None:
        return Quantity(None, "s", flops.how)
    seconds = machine.stage_overhead_s + flops.value / (ranks * machine.peak_flops_per_rank * machine.expected_mfu)
    if isinstance(stage, Quantize) and facts:
        seconds += facts.parameters.total / QUANTIZE_PARAMETERS_PER_S
    return Quantity(seconds, "s", "estimated: FLOPs / (ranks x peak x MFU) + start")


def _energy(machine: Machine, seconds: Quantity, nodes: int, ranks_per_node: int) -> Quantity:
    if seconds.value is None:
        return Quantity(None, "J", seconds.how)
    power = machine.power
    idle_cores = machine.ranks_per_node - ranks_per_node
    watts = ranks_per_node * (power.cpu_busy_w_per_core + power.accelerator_w) + idle_cores * power.cpu_idle_w_per_core
    watts += power.dram_w_per_gib * machine.memory_gib_per_rank * machine.ranks_per_node
    return Quantity(seconds.value * watts * nodes, "J", f"estimated: {power.source}")


def _held_out_tokens(stage: Stage, limit: int | None) -> int | None:
    """Held-out tokens of a prepare stage, at most `limit`; None when its text is not here."""
    assert isinstance(stage, Prepare)
    text = _text_bytes(stage)
    if text is None:
        return limit
    tokens = round(text * stage.held_out_fraction / BYTES_PER_TOKEN)
    return tokens if limit is None else min(limit, tokens)


def _text_bytes(stage: Stage) -> int | None:
    """Size of a prepare stage's text where that can be seen without reading it."""
    assert isinstance(stage, Prepare)
    total = 0
    for source in stage.sources:
        folder = ""
        if source.module:
            module = find_spec(source.module.split(":")[0])
            if module is None or module.origin is None or not Path(module.origin).is_file():
                return None
            total += Path(module.origin).stat().st_size
        if source.package:
            spec = find_spec(source.package)
            if spec is None or not spec.submodule_search_locations:
                return None
            folder = spec.submodule_search_locations[0] + "/"
        for pattern in source.files:
            total += sum(Path(name).stat().st_size for name in glob.glob(folder + pattern, recursive=True))
    return total or None
