"""From a configuration and a machine to a plan: stages x resources, with memory, FLOPs, hours, watt-hours, footprint.

Every figure says how it was come by. Time rests on a measured rate where there is one (hpc/plan/calibration.py), else
on the site's profile; energy is time x the power of the site's nodes. All of it is for a decision before a node-hour is
spent.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hpc.config import (
    AdapterTraining,
    Facility,
    Machine,
    Prepare,
    Quantize,
    Relora,
    RunConfig,
    Stage,
    TrainingBase,
    Trains,
)
from hpc.energy.footprint import Footprint, footprint
from hpc.plan.budget import check_budgets
from hpc.plan.calibration import Measured
from hpc.plan.checks import check_memory, check_stage
from hpc.plan.duration import HOST_BYTES_PER_S, step_time
from hpc.plan.facts import Facts, all_facts, compute_precision
from hpc.plan.failures import Failures, failures
from hpc.plan.imbalance import imbalance
from hpc.plan.memory import Memory, checkpoint_bytes, training_memory
from hpc.plan.params import count_adapter
from hpc.plan.process import PROCESS_BYTES
from hpc.plan.quantity import GIB, Quantity, unknown
from hpc.plan.quantizing import quantize_memory, signround_flops
from hpc.plan.reused import catalogue_note
from hpc.plan.step_time import StepTime
from hpc.plan.work import Work, text_bytes, work

PREPARE_BYTES_PER_S = 2.5e6
"""Text through tokenizer training and encoding on two cores, measured on the quickstart's text."""
QUANTIZE_PARAMETERS_PER_S = 1.0e6
"""Round-to-nearest on one core, measured on the quickstart's model."""


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
    memory: Memory | None = None
    """Of a training stage, part by part."""
    step: StepTime | None = None
    """Seconds of one optimizer step, part by part."""
    checkpoint: Quantity = field(default_factory=lambda: unknown("B", "the stage saves no checkpoint"))
    """Of all ranks together."""
    checkpoint_time: Quantity = field(default_factory=lambda: unknown("s", "the stage saves no checkpoint"))
    failures: Failures | None = None
    """Where the site states how often its nodes fail."""


@dataclass(frozen=True)
class Plan:
    """What will run."""

    run: str
    stages: tuple[StagePlan, ...]
    total_time: Quantity
    total_energy: Quantity
    assumptions: tuple[str, ...]
    footprint: Footprint | None = None
    """Of all stages whose energy is known."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, for plan.json and `plan --json`."""
        content = asdict(self)
        for stage, planned in zip(content["stages"], self.stages, strict=True):
            if planned.memory is not None:
                stage["memory"]["bytes"] = planned.memory.bytes
        return content


def plan(
    config: RunConfig, machine: Machine, facility: Facility | None = None, measured: Measured | None = None
) -> Plan:
    """Plan every stage in the order in which it can run. Raises ConfigError for what the machine does not offer."""
    facts, measured = all_facts(config), measured or Measured()
    stages = [_plan_stage(config, machine, stage, facts[stage.name], measured) for stage in config.ordered()]
    known = [stage for stage in stages if stage.time.value is not None]
    partly = "" if len(known) == len(stages) else f" of {len(known)} of {len(stages)} stages"
    joules = sum(stage.energy.value or 0 for stage in known)
    node_hours = sum((stage.time.value or 0) * stage.nodes for stage in known) / 3600
    return Plan(
        run=config.name,
        stages=tuple(stages),
        total_time=Quantity(sum(s.time.value or 0 for s in known), "s", f"estimated: sum{partly}"),
        total_energy=Quantity(joules, "J", f"estimated: sum{partly}"),
        assumptions=(
            *check_budgets(config, {stage.name: stage.energy.value for stage in stages}),
            *_assumptions(machine, measured),
        ),
        footprint=footprint(joules, node_hours, facility) if facility else None,
    )


def _assumptions(machine: Machine, measured: Measured) -> tuple[str, ...]:
    rates = list(dict.fromkeys(rate.how for rate in measured.rates.values()))
    start = f"{machine.stage_overhead_s:.0f} s to start a stage; --calibrate and --measured RUN do better"
    if rates:
        time = "; ".join(rates)
    elif machine.device == "cuda" and machine.accelerator:
        time = (
            f"estimated, data sheet of {machine.accelerator} with constants fitted on published runs (`bench plan`) + "
            f"{start}"
        )
    else:
        peak = f"{machine.peak_flops_per_rank:.3g} FLOP/s per rank x {machine.expected_mfu} expected MFU"
        time = f"estimated, FLOPs / ({peak}: {machine.source}) + {start}"
    source = machine.power.source
    return (
        f"time: {time}",
        f"energy: estimated, time x power of the busy nodes ({source})"
        if machine.power.node_busy_w
        else f"energy: estimated, time x power of the busy cores and memory of all ranks ({source})",
        "FLOPs: derived, 6 x active matrix parameters + 12 L H T per token (arXiv:2204.02311, appendix B)",
        "memory: derived from what the engine allocates (hpc/plan/memory.py; ZeRO: arXiv:1910.02054), for the 99th "
        "percentile of the experts' load; --detail STAGE shows every part",
    )


def _plan_stage(
    config: RunConfig, machine: Machine, stage: Stage, facts: Facts | None, measured: Measured
) -> StagePlan:
    settings: TrainingBase | None = stage.train if isinstance(stage, Trains) else None
    nodes = settings.parallel.nodes if settings else 1
    ranks_per_node = settings.parallel.ranks_per_node if settings else 1
    check_stage(machine, stage, facts, nodes, ranks_per_node)
    todo = work(config, stage, facts)
    precision = compute_precision(machine, settings) if settings else None
    memory = step = None
    if settings and facts and precision:
        memory, step = stage_layout(facts, settings, machine, measured, stage)
        check_memory(machine, stage, memory)
    saved = _checkpoint(settings, trainable := _trainable(stage, facts))
    save_time = _checkpoint_time(machine, saved)
    time = _seconds(machine, stage, todo, facts, step, measured)
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
        tokens=todo.tokens,
        gradient_accumulation_steps=settings.gradient_accumulation_steps if settings else None,
        total_params=facts.parameters.total if facts else None,
        active_params=facts.parameters.active if facts else None,
        trainable_params=trainable,
        memory_per_rank=_memory_quantity(config, stage, facts, memory),
        flops=todo.flops,
        time=time,
        energy=energy_of(machine, time, nodes, ranks_per_node),
        notes=(*catalogue_note(config, stage), *todo.notes, *_peak_note(stage.name, measured)),
        deepspeed_overlay=settings.deepspeed if settings else {},
        memory=memory,
        step=step,
        checkpoint=saved,
        checkpoint_time=save_time,
        failures=_failures(machine, settings, step, time, saved, save_time),
    )


def stage_layout(
    facts: Facts, settings: TrainingBase, machine: Machine, measured: Measured, stage: Stage
) -> tuple[Memory, StepTime]:
    """Memory of a rank and time of a step, of one layout of a training stage."""
    precision = compute_precision(machine, settings)
    load = imbalance(facts.router, settings.parallel.expert_parallel_size, measured.histogram)
    memory = training_memory(facts, settings, precision, on_cpu=machine.device != "cuda", load=load)
    rate = measured.rate(stage.name, stage.kind)
    flops_per_s = rate.flops_per_s if rate else None
    return memory, step_time(facts, settings, machine, 4 if precision == "fp32" else 2, flops_per_s)


def _trainable(stage: Stage, facts: Facts | None) -> int | None:
    if facts is None or not isinstance(stage, Trains):
        return None
    parameters = facts.parameters
    if not isinstance(stage.train, AdapterTraining):
        return parameters.total
    adapters = count_adapter(facts.model, facts.router, stage.train)
    if isinstance(stage, Relora):  # what has no adapter is trained as well
        adapters += parameters.without_adapter
    return adapters


def _memory_quantity(config: RunConfig, stage: Stage, facts: Facts | None, memory: Memory | None) -> Quantity:
    if facts is None:
        return unknown("B", "no model, or its size is not known yet")
    if isinstance(stage, Quantize):
        parts = quantize_memory(facts, stage, len(config.needed(stage, ["tokens"])))
        fullest = max(parts, key=lambda part: part.bytes)
        return Quantity(fullest.bytes, "B", f"derived: {fullest.name}: {fullest.formula}")
    if memory is None:
        return Quantity(PROCESS_BYTES + 4.0 * facts.parameters.total, "B", "derived: fp32 weights, and the process")
    return Quantity(
        memory.bytes, "B",
        f"derived: what stays and the {memory.fullest.name}; estimated: activations at p99 of the experts' load",
    )  # fmt: skip


def _peak_note(name: str, measured: Measured) -> tuple[str, ...]:
    peak = measured.peaks.get(name)
    return () if peak is None else (f"{peak / GIB:.2f} GiB on the fullest rank (measured in {measured.source})",)


def _checkpoint(settings: TrainingBase | None, trainable: int | None) -> Quantity:
    if settings is None or trainable is None:
        return unknown("B", "the stage saves no checkpoint, or its model is not known yet")
    return Quantity(checkpoint_bytes(trainable), "B", "derived: fp32 weights and two moments, 12 B per parameter")


def _checkpoint_time(machine: Machine, saved: Quantity) -> Quantity:
    if saved.value is None:
        return unknown("s", saved.how.removeprefix("unknown: "))
    if machine.storage_bytes_per_s is None:
        return unknown("s", "the site does not state storage_bytes_per_s; `bench checkpoint` measures it")
    return Quantity(saved.value / machine.storage_bytes_per_s, "s", "estimated: bytes / storage_bytes_per_s")


def _failures(
    machine: Machine,
    settings: TrainingBase | None,
    step: StepTime | None,
    time: Quantity,
    saved: Quantity,
    save_time: Quantity,
) -> Failures | None:
    if settings is None or step is None or time.value is None or saved.value is None:
        return None
    copying = saved.value / settings.parallel.world_size / HOST_BYTES_PER_S
    stall = copying if settings.checkpoint_async else save_time.value
    if stall is None or machine.node_mtbf_hours is None:
        return None
    return failures(
        time.value, settings.parallel.nodes, machine.node_mtbf_hours,
        settings.checkpoint_every_steps * step.seconds, stall, machine.stage_overhead_s,
    )  # fmt: skip


def _seconds(
    machine: Machine, stage: Stage, todo: Work, facts: Facts | None, step: StepTime | None, measured: Measured
) -> Quantity:
    if stage.name in measured.seconds and not isinstance(stage, Trains):
        return Quantity(measured.seconds[stage.name], "s", f"estimated: as long as measured in {measured.source}")
    start = measured.start(stage.name, stage.kind)
    start = machine.stage_overhead_s if start is None else start
    if isinstance(stage, Prepare):
        text = text_bytes(stage)
        if text is None:
            return unknown("s", "the text is not here")
        return Quantity(start / 4 + text / PREPARE_BYTES_PER_S, "s", "estimated: bytes of text / 2.5 MB/s")
    if todo.flops.value is None:
        return unknown("s", todo.flops.how.removeprefix("unknown: "))
    rate = measured.rate(stage.name, stage.kind)
    flops_per_s = rate.flops_per_s if rate else machine.peak_flops_per_rank * machine.expected_mfu
    basis = f"rate {rate.how}" if rate else "data sheet" if machine.accelerator else "peak x MFU"
    if isinstance(stage, Trains) and step is not None:
        seconds = start + training_seconds(stage.train, todo, step, measured)
        return Quantity(seconds, "s", f"estimated: steps, held-out text and start; {basis}")
    seconds = start + todo.flops.value / flops_per_s
    if isinstance(stage, Quantize) and facts:
        seconds += facts.parameters.total / QUANTIZE_PARAMETERS_PER_S + signround_flops(facts, stage) / flops_per_s
    return Quantity(seconds, "s", f"estimated: FLOPs and start; {basis}")


def training_seconds(settings: TrainingBase, todo: Work, step: StepTime, measured: Measured) -> float:
    """Steps and held-out text of a training stage."""
    steps = settings.steps * step.seconds
    flops, ranks = todo.flops.value or 1.0, settings.parallel.world_size
    return steps + measured.held_out_seconds(todo.held_out_flops, flops, steps, ranks)


def energy_of(machine: Machine, seconds: Quantity, nodes: int, ranks_per_node: int) -> Quantity:
    """Joules of `nodes` busy nodes."""
    if seconds.value is None:
        return unknown("J", seconds.how.removeprefix("unknown: "))
    power = machine.power
    if power.node_busy_w is not None:
        return Quantity(seconds.value * power.node_busy_w * nodes, "J", f"estimated: watts of a node, {power.source}")
    idle_cores = machine.ranks_per_node - ranks_per_node
    watts = ranks_per_node * (power.cpu_busy_w_per_core + power.accelerator_w) + idle_cores * power.cpu_idle_w_per_core
    watts += power.dram_w_per_gib * machine.memory_gib_per_rank * machine.ranks_per_node
    return Quantity(seconds.value * watts * nodes, "J", f"estimated: {power.source}")
