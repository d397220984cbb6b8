"""What was measured, in the terms of a plan: rates of ranks, starts of stages, loads of experts.

From the run directory of an earlier run (`--measured RUN`): its configuration, receipts and metrics. From a few real
steps on this machine (`--calibrate`): hpc/bench/step.py. A rate is model FLOP/s of one rank without what a step spends
on exchange and on memory by hpc/plan/duration.py, so that it carries over to other layouts of the same machine.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from hpc.config import Machine, Pretrain, RunConfig, TrainingBase, Trains
from hpc.config.load import load_config
from hpc.errors import ArtifactError, ConfigError
from hpc.plan.duration import step_time
from hpc.plan.facts import Facts, all_facts, compute_precision
from hpc.plan.imbalance import Histogram, from_metrics
from hpc.plan.work import work

LEAST_SHARE = 0.3
"""Of a measured step that is taken as compute at least, whatever exchange and memory are estimated at."""


@dataclass(frozen=True)
class Rate:
    """Model FLOP/s of one rank in training."""

    flops_per_s: float
    how: str


@dataclass(frozen=True)
class Measured:
    """Figures for a plan; what is not there stays as the site states it."""

    rates: Mapping[str, Rate] = field(default_factory=dict)
    """By name of stage in an earlier run, and by kind: pretrain, lora."""
    starts: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a stage that are neither steps nor held-out text, by name and by kind."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of stages that do not train, by name."""
    peaks: Mapping[str, int] = field(default_factory=dict)
    """Memory of the fullest rank, of training stages by name."""
    histogram: Histogram | None = None
    source: str = ""

    def rate(self, name: str, kind: str) -> Rate | None:
        """Of that stage, of its kind, or of the other kind."""
        return self.rates.get(name) or self.rates.get(kind) or next(iter(self.rates.values()), None)

    def start(self, name: str, kind: str) -> float | None:
        """Of that stage, or of its kind."""
        return self.starts.get(name, self.starts.get(kind))

    def held_out_seconds(self, flops: float, training: float, training_s: float, ranks: int) -> float:
        """Forward passes over held-out text: at the fastest rate that was measured (adapters train at less than that
        of plain products), else at that of the training steps, which did `training` FLOPs in `training_s`."""
        if not self.rates:
            return training_s * flops / training
        return flops / (ranks * max(rate.flops_per_s for rate in self.rates.values()))


def rate_of(facts: Facts, settings: TrainingBase, machine: Machine, tokens_per_s: float, where: str) -> Rate:
    """The rate that gives a measured speed of a layout again."""
    item = 4 if compute_precision(machine, settings) == "fp32" else 2
    at_one = step_time(facts, settings, machine, item, 1.0).parts
    measured = settings.batches.tokens_per_step / tokens_per_s
    compute = max(LEAST_SHARE * measured, measured - at_one["memory"] - at_one.get("exchange", 0.0))
    rate = (at_one["compute"] + at_one["recompute"]) / compute
    return Rate(rate, f"measured: {tokens_per_s:,.0f} tokens/s {where}, {rate:.3g} FLOP/s per rank")


def from_run(root: Path, machine: Machine) -> Measured:
    """Of a run directory. Raises ArtifactError when nothing in it was measured."""
    if not (root / "config.yaml").is_file():
        raise ArtifactError(f"{root} is no run directory: name one, such as runs/quickstart")
    config = load_config(root / "config.yaml")
    facts, found = all_facts(config), Measured(source=str(root))
    for stage in sorted(config.ordered(), key=lambda stage: stage.kind != "pretrain"):
        folder = root / "stages" / stage.name
        receipt = _receipt(folder)
        known = facts[stage.name]
        if isinstance(stage, Trains):
            speed = _speed(folder, receipt)
            if known is None or speed is None:
                continue
            rate = rate_of(known, stage.train, machine, speed, f"of stage {stage.name} in {root}")
            found = replace(found, rates={stage.kind: rate, **found.rates, stage.name: rate})
            if receipt is not None and receipt["metrics"].get("peak_memory_bytes"):
                found = replace(found, peaks={**found.peaks, stage.name: receipt["metrics"]["peak_memory_bytes"]})
            start = _start(config, stage, known, receipt, found)
            if start is not None:
                found = replace(found, starts={stage.kind: start, **found.starts, stage.name: start})
            if isinstance(stage, Pretrain) and found.histogram is None:
                found = replace(found, histogram=from_metrics(folder / "metrics.jsonl"))
        elif receipt is not None:
            found = replace(found, seconds={**found.seconds, stage.name: float(receipt["seconds"])})
    if not found.rates and not found.seconds:
        raise ArtifactError(f"nothing was measured in {root}: no stage has trained a step or left a receipt")
    return found


def from_steps(speeds: Mapping[str, tuple[Facts, TrainingBase, float]], machine: Machine) -> Measured:
    """Of real steps that were just done here: kind of stage -> model, settings, tokens/s."""
    rates = {
        kind: rate_of(facts, settings, machine, speed, f"in steps of {kind} on this machine")
        for kind, (facts, settings, speed) in speeds.items()
    }
    return Measured(rates=rates, source="steps on this machine")


def to_measure(config: RunConfig) -> dict[str, tuple[Trains, Facts]]:
    """The first training stage of each kind, and its model: what `--calibrate` measures. Raises ConfigError."""
    facts = all_facts(config)
    found: dict[str, tuple[Trains, Facts]] = {}
    for stage in config.ordered():
        known = facts[stage.name]
        if isinstance(stage, Trains) and known is not None:
            found.setdefault(stage.kind, (stage, known))
    if not found:
        raise ConfigError("--calibrate measures training steps, but no stage trains a model whose size is known")
    return found


def _receipt(folder: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))
        return content
    except (OSError, ValueError):
        return None


def _speed(folder: Path, receipt: dict[str, Any] | None) -> float | None:
    """Tokens/s: of the receipt, or of the last steps of a stage that is not done."""
    if receipt is not None and receipt["metrics"].get("tokens_per_s"):
        return float(receipt["metrics"]["tokens_per_s"])
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-50:]]
    except (OSError, ValueError):
        return None
    speeds = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s")]
    return median(speeds) if speeds else None


def _start(
    config: RunConfig, stage: Trains, facts: Facts, receipt: dict[str, Any] | None, found: Measured
) -> float | None:
    """What is left of a stage's wall time without its steps and held-out text; None after several attempts."""
    if receipt is None or receipt["attempts"] != 1:
        return None
    todo, ranks = work(config, stage, facts), stage.train.parallel.world_size
    speed = float(receipt["metrics"]["tokens_per_s"])
    steps = stage.train.steps * stage.train.batches.tokens_per_step / speed
    held_out = found.held_out_seconds(todo.held_out_flops, todo.flops.value or 1.0, steps, ranks)
    return max(0.0, float(receipt["seconds"]) - steps - held_out)
