"""What the nodes of a running stage draw right now, read from the tails of their energy files.

Rank 0 puts it into every metrics row, so that loss and watts share a time axis. Cheap: a few kilobytes per call.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.energy.curves import read_samples

TAIL_BYTES = 8192


@dataclass(frozen=True)
class MeterReading:
    """The last samples of all nodes."""

    power_w_by_host: dict[str, float]
    """Watts per node; a node without a sample is absent."""
    energy_j_by_host: dict[str, float]
    """Joules per node so far, over all attempts; a node without a sample in this one keeps what it drew before."""
    energy_j: float | None
    """Joules of the stage so far, over all attempts and nodes; None when nothing was sampled yet."""


class EnergyMeter:
    """Reads energy-HOST.jsonl of one stage; energy of attempts before this one is read once."""

    def __init__(self, stage_directory: Path, attempt: int) -> None:
        self._root, self._attempt = stage_directory, attempt
        self._earlier_j: dict[str, float] = {}
        for one in read_samples(stage_directory):
            if one.attempt != attempt and one.energy_j is not None:
                self._earlier_j[one.host] = self._earlier_j.get(one.host, 0.0) + one.energy_j

    def read(self) -> MeterReading:
        """The newest sample of each node that belongs to this attempt."""
        power: dict[str, float] = {}
        energy, is_sampled = dict(self._earlier_j), False
        for host, row in _last_samples(self._root, self._attempt):
            if row.get("total_power_w") is not None:
                power[host] = float(row["total_power_w"])
            if row.get("total_energy_j") is not None:
                energy[host] = energy.get(host, 0.0) + float(row["total_energy_j"])
                is_sampled = True
        return MeterReading(power, energy, sum(energy.values()) if is_sampled else None)


@dataclass(frozen=True)
class Power:
    """What all nodes of an attempt draw together."""

    watts: float
    is_estimated: bool
    """Whether any part of it is an estimate."""


def newest_power(stage_directory: Path, attempt: int) -> Power | None:
    """Power of all nodes of an attempt, from their newest samples; None when there is none."""
    samples = _last_samples(stage_directory, attempt)
    watts = [float(row["total_power_w"]) for _, row in samples if row["total_power_w"] is not None]
    if not watts:
        return None
    estimated = any("estimate" in name for _, row in samples for name in row["power_w"])
    return Power(sum(watts), estimated)


def is_sampled(stage_directory: Path, within_s: float = 60.0) -> bool:
    """Whether some node of a stage was sampled just now, by a sampler that wrote no end line."""
    newest = [_last_sample(path) for path in stage_directory.glob("energy-*.jsonl")]
    return any(row and row["event"] == "sample" and time.time() - row["time"] < within_s for row in newest)


def _last_samples(stage_directory: Path, attempt: int) -> list[tuple[str, dict[str, Any]]]:
    """(host, newest sample) of each node that has one in this attempt."""
    rows = [
        (path.stem.removeprefix("energy-"), _last_sample(path))
        for path in sorted(stage_directory.glob("energy-*.jsonl"))
    ]
    return [(host, row) for host, row in rows if row is not None and row.get("attempt") == attempt]


def _last_sample(path: Path) -> dict[str, Any] | None:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("event") in ("sample", "end"):
            return row
    return None
