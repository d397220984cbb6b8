"""What a model had spent when its held-out loss first reached a value, read off a run's metrics.jsonl.

The held-out loss is measured every few steps; between two measurements it is taken as a straight line in tokens, and
so are seconds and joules. The first row (step 0) is where counting starts: starting processes is left out, held-out
measurements are in. Joules are the samplers', once a second.
"""

from dataclasses import dataclass
from pathlib import Path

from hpc.tracking.metrics import history


@dataclass(frozen=True)
class Spent:
    """From the first step to some loss."""

    tokens: float
    seconds: float
    energy_j: float | None


@dataclass(frozen=True)
class Point:
    """One measurement of the held-out loss."""

    loss: float
    spent: Spent


def held_out_curve(metrics: Path) -> list[Point]:
    """All measurements of the held-out loss in a metrics.jsonl, in the order of steps."""
    rows = [row for row in history(metrics) if row.get("heldout_loss") is not None]
    if not rows:
        return []
    first = rows[0]
    start_j = first.get("energy_j")
    return [
        Point(
            float(row["heldout_loss"]),
            Spent(
                float(row["tokens"] - first["tokens"]),
                float(row["time"] - first["time"]),
                None if start_j is None or row.get("energy_j") is None else float(row["energy_j"] - start_j),
            ),
        )
        for row in rows
    ]


def first_reach(curve: list[Point], loss: float) -> Spent | None:
    """What was spent when `loss` was first reached; None when it never was."""
    before: Point | None = None
    for point in curve:
        if point.loss <= loss:
            return point.spent if before is None else _between(before, point, loss)
        before = point
    return None


def _between(before: Point, after: Point, loss: float) -> Spent:
    part = (before.loss - loss) / (before.loss - after.loss)

    def at(start: float, end: float) -> float:
        return start + part * (end - start)

    a, b = before.spent, after.spent
    energy = None if a.energy_j is None or b.energy_j is None else at(a.energy_j, b.energy_j)
    return Spent(at(a.tokens, b.tokens), at(a.seconds, b.seconds), energy)
