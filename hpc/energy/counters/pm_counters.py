"""HPE Cray pm_counters: the energy of a whole node, accelerators and network included.

Files of /sys/cray/pm_counters hold `<integer> J <microseconds> us`, refreshed at 10 Hz and readable by everybody.
`freshness` counts refreshes: values read between two equal readings of it belong together.
"""

from pathlib import Path

from hpc.energy.counters.base import Accumulator, Reading, Scope

FOLDER = "sys/cray/pm_counters"
TRIES = 5


class PmCounters:
    """Node energy and power of a Cray EX node."""

    name = "pm_counters"
    scope: Scope = "node"
    provenance = "measured: HPE Cray pm_counters (whole node, 10 Hz)"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._accumulator = Accumulator()
        self.read()

    def read(self) -> Reading:
        """Energy since the start, and the node's own power figure."""
        for _ in range(TRIES):
            try:
                before = self._value("freshness")
                energy, power = self._value("energy"), self._value("power")
                if self._value("freshness") == before:
                    self._accumulator.add(energy)
                    return Reading(self._accumulator.total_j, power)
            except (OSError, ValueError, IndexError):
                continue
        return self._accumulator.reading()

    def _value(self, name: str) -> float:
        return float((self._folder / name).read_text().split()[0])


def find(root: Path) -> tuple[list[PmCounters], list[str]]:
    """The node's counter, if this is a Cray node, and notes on why not."""
    folder = root / FOLDER
    if not (folder / "energy").exists():
        return [], []
    counter = PmCounters(folder)
    if counter.read().energy_j is None:
        return [], [f"/{FOLDER} is there but cannot be read"]
    return [counter], []
