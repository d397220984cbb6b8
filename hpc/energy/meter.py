"""What the nodes of a running stage draw right now, read from the tails of their energy files.

Rank 0 puts it into every metrics row, so that loss and watts share a time axis. Cheap: a few kilobytes per call.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAIL_BYTES = 8192


@dataclass(frozen=True)
class MeterReading:
    """The last samples of all nodes."""

    power_w_by_host: dict[str, float]
    """Watts per node; a node without a sample is absent."""
    energy_j: float | None
    """Joules of the stage so far, over all attempts and nodes; None when nothing was sampled yet."""


class EnergyMeter:
    """Reads energy-HOST.jsonl of one stage; energy of attempts before this one is read once."""

    def __init__(self, stage_directory: Path, attempt: int) -> None:
        from hpc.energy.ledger import stage_energy

        self._root, self._attempt = stage_directory, attempt
        earlier = [part.energy_j for part in stage_energy(stage_directory).attempts if part.attempt != attempt]
        self._earlier_j = sum(value for value in earlier if value is not None)

    def read(self) -> MeterReading:
        """The newest sample of each node that belongs to this attempt."""
        power: dict[str, float] = {}
        energy: float | None = None
        for path in sorted(self._root.glob("energy-*.jsonl")):
            row = _last_sample(path)
            if row is None or row.get("attempt") != self._attempt:
                continue
            host = path.stem.removeprefix("energy-")
            if row.get("total_power_w") is not None:
                power[host] = float(row["total_power_w"])
            if row.get("total_energy_j") is not None:
                energy = (energy or 0.0) + float(row["total_energy_j"])
        return MeterReading(power, None if energy is None else energy + self._earlier_j)


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
