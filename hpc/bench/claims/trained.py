"""What the claims that train have in common: a recipe run as a user runs it, and two models compared at equal loss."""

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import hpc
from hpc.bench.claims.claim import Bench, Measured
from hpc.bench.claims.curves import Point, Spent, first_reach, held_out_curve
from hpc.config.load import load_config
from hpc.errors import StageError, error_by_exit_code
from hpc.run.directory import RunDirectory
from hpc.run.receipt import read_receipt

ROOT = Path(hpc.__file__).parent.parent
UNITS = {"energy": "J", "time": "s", "FLOPs": "FLOP", "tokens": "tokens"}
"""What is compared, and its unit."""
Amounts = dict[str, float | None]
"""Quantity of UNITS -> how much; None where it is not known."""


@dataclass(frozen=True)
class Trained:
    """One training stage of one run, as a comparison sees it."""

    curve: list[Point]
    loss: float
    """Over all held-out tokens, after the last step."""
    flops_per_token: float
    energy_how: str
    """Where its joules come from."""


@dataclass(frozen=True)
class Saving:
    """A model beside its rival, in one run, at the lowest loss that both reached."""

    seed: int
    rival: str
    loss: float
    parts: Amounts
    """Fraction saved; negative where the model took more."""
    spent: dict[str, tuple[float | None, float | None]]
    """Quantity -> what the model took, what the rival took."""
    energy_how: str


def run_recipe(bench: Bench, claim: str, file: str, settings: Iterable[str]) -> RunDirectory:
    """`launch.py run configs/FILE`, and the run directory it left: of one recipe always the same, so that what did not
    change is done once. Raises the error that the run ended with."""
    path = ROOT / "configs" / file
    words = [word for setting in (f"run_root={bench.folder}", *settings) for word in ("--set", setting)]
    command = [sys.executable, str(ROOT / "launch.py"), "run", str(path), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise error_by_exit_code(done.returncode, f"{claim}: {last.removeprefix('error: ')}")
    return RunDirectory(bench.folder / load_config(path).name)


def trained(claim: str, run: RunDirectory, stage: str) -> Trained:
    """What a training stage left. Raises StageError when it is not done."""
    directory = run.stage(stage)
    receipt = read_receipt(directory)
    if receipt is None:
        raise StageError(f"{claim}: stage {stage!r} left no receipt in {directory.root}")
    how = "; ".join(str(source) for source in receipt.energy.get("provenance", [])) or "no counter"
    return Trained(
        curve=held_out_curve(directory.metrics),
        loss=float(receipt.metrics["heldout_loss"]),
        flops_per_token=receipt.metrics["flops"] / receipt.metrics["tokens"],
        energy_how=how,
    )


def compared(seed: int, model: Trained, rival: str, other: Trained, before: Amounts | None = None) -> Saving:
    """What a model saved against its rival, at the lowest held-out loss that both reached.

    before: what the model had taken before its curve begins, and the rival had not.
    """
    loss = max(min(point.loss for point in run.curve) for run in (model, other))
    ours, theirs = first_reach(model.curve, loss), first_reach(other.curve, loss)
    assert ours is not None, "both reach the loss, by its choice"
    assert theirs is not None
    ours_by, theirs_by = amounts(ours, model), amounts(theirs, other)
    if before is not None:
        ours_by = {quantity: _sum(ours_by[quantity], before[quantity]) for quantity in UNITS}
    spent = {quantity: (ours_by[quantity], theirs_by[quantity]) for quantity in UNITS}
    parts = {quantity: None if a is None or not b else 1 - a / b for quantity, (a, b) in spent.items()}
    return Saving(seed, rival, loss, parts, spent, model.energy_how)


def amounts(spent: Spent, run: Trained) -> Amounts:
    """By quantity."""
    flops = spent.tokens * run.flops_per_token
    return {"energy": spent.energy_j, "time": spent.seconds, "FLOPs": flops, "tokens": spent.tokens}


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


# What is told ---------------------------------------------------------------------------------------------------------


def change(saved: float) -> str:
    """-12% for a saving of 0.12, +3% where the model took more."""
    return f"{-100 * saved:+.0f}%"


def means(savings: list[Saving], quantities: Iterable[str] = UNITS) -> str:
    """Each quantity's mean over the seeds, and the seeds': energy -60% (seeds: -70%, -50%)."""
    words = []
    for quantity in quantities:
        known = [part for saving in savings if (part := saving.parts[quantity]) is not None]
        if known:
            spread = f" (seeds: {', '.join(change(value) for value in known)})" if len(known) > 1 else ""
            words.append(f"{quantity} {change(mean(known))}{spread}")
    return ", ".join(words)


def lines(saving: Saving, words: str = "") -> list[Measured]:
    """One line a quantity; a negative saving means that the model took more. words: what more is said of it."""
    told = []
    for quantity, part in saving.parts.items():
        ours, theirs = saving.spent[quantity]
        how = saving.energy_how if quantity == "energy" else "from metrics.jsonl, interpolated"
        both = "not known" if ours is None or theirs is None else f"{ours:.4g} against {theirs:.4g} {UNITS[quantity]}"
        name = f"{quantity} saved against {saving.rival}{words}, seed {saving.seed}, to {saving.loss:.3f} nats"
        told.append(Measured(name, None if part is None else 100 * part, "%", f"derived: {both}; {how}"))
    return told


class Load:
    """How busy the machine was while models trained: seconds and joules are theirs if it did nothing else."""

    def __init__(self) -> None:
        self.largest = 0.0

    def look(self) -> None:
        """To be called when a run has ended."""
        self.largest = max(self.largest, os.getloadavg()[1])

    @property
    def is_shared(self) -> bool:
        """Whether it must have worked for others too."""
        return self.largest > (os.cpu_count() or 1) + 1

    @property
    def line(self) -> Measured:
        """As a figure."""
        how = f"measured: kernel; cores: {os.cpu_count()}"
        return Measured("load of the machine, largest of five minutes", self.largest, "", how)
