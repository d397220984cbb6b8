"""RAPL through Linux powercap, Intel and AMD: packages and their memory, in microjoules that wrap.

/sys/class/powercap/intel-rapl:N/{name,energy_uj,max_energy_range_uj}, sub-zones intel-rapl:N:M; the names are the same
for AMD. `package-N` and `dram` are taken. `core` and `uncore` lie inside the package and `psys` overlaps it; zones of
`intel-rapl-mmio` show the same package by another way: none of them is ever added. A package of several dies has a
zone for each (`package-0-die-1`), which on some processors mirror one counter.
Since Linux 5.10 (CVE-2020-8694) only root may read energy_uj: "permission denied" is the normal case, not an error.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from hpc.energy.counters.base import CumulativeCounter, Part, Scope
from hpc.energy.counters.sysfs import read_number, read_text

FOLDER = "sys/class/powercap"
DENIED = (
    "permission denied (readable by root only since Linux 5.10): ask the site to let your job read "
    "/sys/class/powercap/*/energy_uj, or for Slurm's energy accounting"
)


class RaplZone(CumulativeCounter):
    """One package, one of its dies, or one package's memory."""

    unit = "uJ"
    provenance = "measured: RAPL powercap"

    def __init__(self, zone: Path, name: str, scope: Scope, part: Part) -> None:
        self.scope = scope
        self.wrap_j = read_number(zone / "max_energy_range_uj") / 1e6
        self._file = zone / "energy_uj"
        super().__init__(name, frozenset({part}))
        self.open()

    def _joules(self) -> float:
        return read_number(self._file) / 1e6

    def mirrors(self, other: "RaplZone") -> bool:
        """Whether both show one counter: its value lies between two readings of the other's in a row.

        Counters of their own are billions of microjoules apart, and a reading takes microseconds. Two that show
        nothing say nothing.
        """
        before, here, after = other._joules(), self._joules(), other._joules()
        return 0 < before <= here <= after


@dataclass(frozen=True)
class _Zone:
    path: Path
    name: str
    scope: Scope
    part: Part


def find(root: Path) -> tuple[list[RaplZone], list[str]]:
    """Readable packages and memory zones, and notes on those that are not."""
    zones: list[RaplZone] = []
    notes: list[str] = []
    for zone in _zones(root / FOLDER):
        try:
            counter = RaplZone(zone.path, f"{zone.path.name} {zone.name}", zone.scope, zone.part)
            twin = next((z for z in zones if z.scope == zone.scope == "package" and counter.mirrors(z)), None)
        except PermissionError:
            notes.append(f"RAPL {zone.name}: {DENIED}")
        except (OSError, ValueError) as error:
            notes.append(f"RAPL {zone.name}: {error}")
        else:
            if twin:
                notes.append(f"RAPL {zone.name} mirrors {twin.name}: counted once")
            else:
                zones.append(counter)
    return zones, notes


def _zones(folder: Path) -> list[_Zone]:
    """Packages and memories with the socket that each belongs to."""
    found: list[_Zone] = []
    packages: dict[str, int] = {}
    for path in sorted(folder.glob("intel-rapl:*"), key=lambda path: _numbers(path.name)):
        try:
            name = read_text(path / "name").strip()
        except (OSError, ValueError):
            continue
        package = re.fullmatch(r"package-(\d+)(?:-die-(\d+))?", name)
        parent = path.name.split(":")[1]
        if package:
            packages[parent] = int(package[1])
            found.append(_Zone(path, name, "package", Part("cpu", int(package[1]), f"die{package[2] or ''}")))
        elif name == "dram" and parent in packages:
            found.append(_Zone(path, name, "dram", Part("dram", packages[parent], path.name)))
    return found


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
