"""RAPL through Linux powercap, Intel and AMD: packages and their memory, in microjoules that wrap.

/sys/class/powercap/intel-rapl:N/{name,energy_uj,max_energy_range_uj}, sub-zones intel-rapl:N:M. `package-N` and
`dram` are taken; `core` and `uncore` are inside the package and `psys` overlaps it, so adding them would count twice.
Since Linux 5.10 only root may read energy_uj: "permission denied" is the normal case and is said, not an error.
"""

import contextlib
from pathlib import Path

from hpc.energy.counters.base import Accumulator, Reading, Scope

FOLDER = "sys/class/powercap"


class RaplZone:
    """One package or one package's memory."""

    provenance = "measured: RAPL powercap"

    def __init__(self, zone: Path, label: str, scope: Scope) -> None:
        self.name, self.scope = label, scope
        self._file = zone / "energy_uj"
        self._accumulator = Accumulator(wrap_j=_number(zone / "max_energy_range_uj") / 1e6)
        self._accumulator.add(_number(self._file) / 1e6)

    def read(self) -> Reading:
        """Energy since the start; power as the mean since the reading before."""
        with contextlib.suppress(OSError, ValueError):
            self._accumulator.add(_number(self._file) / 1e6)
        return self._accumulator.reading()


def find(root: Path) -> tuple[list[RaplZone], list[str]]:
    """Readable packages and memory zones, and notes on those that are not."""
    zones: list[RaplZone] = []
    notes: list[str] = []
    for zone in sorted((root / FOLDER).glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
        except OSError:
            continue
        scope: Scope | None = "package" if name.startswith("package") else "dram" if name == "dram" else None
        if scope is None:
            continue
        try:
            zones.append(RaplZone(zone, f"{zone.name} {name}", scope))
        except PermissionError:
            notes.append(f"RAPL {name}: permission denied (readable by root only since Linux 5.10)")
        except (OSError, ValueError) as error:
            notes.append(f"RAPL {name}: {error}")
    return zones, notes


def _number(path: Path) -> float:
    return float(path.read_text())
