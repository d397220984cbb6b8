"""Joules of a stage from what its nodes' samplers wrote: all attempts, failed ones included.

A node that died without an end line counts up to its last sample and is marked incomplete; nothing is filled in.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc.run.directory import read_jsonl


@dataclass(frozen=True)
class AttemptEnergy:
    """One attempt on one node."""

    attempt: int
    host: str
    energy_j: float | None
    duration_s: float
    complete: bool
    """Whether the sampler wrote its end line."""


@dataclass(frozen=True)
class StageEnergy:
    """A stage over all attempts and nodes."""

    energy_j: float | None
    """Sum over attempts and nodes; None when nothing was sampled."""
    duration_s: float
    """Seconds sampled, summed over attempts and nodes."""
    provenance: list[str]
    """Every source that contributed, 'measured: ...' or 'estimated: ...'."""
    attempts: list[AttemptEnergy]
    by_counter: dict[str, float] = field(default_factory=dict)


def stage_energy(stage_directory: Path) -> StageEnergy:
    """Add up what the samplers of a stage wrote."""
    parts: list[AttemptEnergy] = []
    provenance: dict[str, None] = {}
    by_counter: dict[str, float] = {}
    for path in sorted(stage_directory.glob("energy-*.jsonl")):
        host = path.stem.removeprefix("energy-")
        for rows in _by_attempt(read_jsonl(path)):
            samples = [row for row in rows if row.get("event") in ("sample", "end")]
            for row in rows:
                provenance.update(dict.fromkeys(counter["provenance"] for counter in row.get("counters", [])))
            if not samples:
                continue
            last = samples[-1]
            for name, joules in last["energy_j"].items():
                by_counter[name] = by_counter.get(name, 0.0) + (joules or 0.0)
            parts.append(
                AttemptEnergy(
                    attempt=int(last["attempt"]),
                    host=host,
                    energy_j=last["total_energy_j"],
                    duration_s=float(last["time"]) - float(rows[0]["time"]),
                    complete=last["event"] == "end",
                )
            )
    known = [part.energy_j for part in parts if part.energy_j is not None]
    return StageEnergy(
        sum(known) if known else None, sum(p.duration_s for p in parts), list(provenance), parts, by_counter
    )


def power_series(stage_directory: Path) -> list[tuple[float, str, int, float]]:
    """(unix time, host, attempt, watts) of every sample, in the order of time."""
    series = [
        (float(row["time"]), path.stem.removeprefix("energy-"), int(row["attempt"]), float(row["total_power_w"]))
        for path in stage_directory.glob("energy-*.jsonl")
        for row in read_jsonl(path)
        if row.get("total_power_w") is not None
    ]
    return sorted(series)


def _by_attempt(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows between one start line and the next."""
    groups: list[list[dict[str, Any]]] = []
    for row in rows:
        if row.get("event") == "start":
            groups.append([])
        if groups:
            groups[-1].append(row)
    return groups
