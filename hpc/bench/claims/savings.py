"""Two models that were trained, compared at equal held-out loss: what the one saved against the other."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from hpc.bench.claims.claim import Measured
from hpc.bench.claims.curves import Spent, first_reach
from hpc.bench.claims.trained import Trained

UNITS = {"energy": "J", "time": "s", "FLOPs": "FLOP", "tokens": "tokens"}
"""What is compared, and its unit."""
Amounts = dict[str, float | None]
"""Quantity of UNITS -> how much; None where it is not known."""


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
    flops = spent.tokens * flops_per_token(run)
    return {"energy": spent.energy_j, "time": spent.seconds, "FLOPs": flops, "tokens": spent.tokens}


def flops_per_token(run: Trained) -> float:
    """Of a stage whose receipt counts its FLOPs."""
    flops: float = run.metrics["flops"] / run.metrics["tokens"]
    return flops


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
