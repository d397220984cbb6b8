"""HPE Cray pm_counters: the energy of a whole node, accelerators and network included.

Files of /sys/cray/pm_counters hold `<integer> J <microseconds> us`, refreshed at 10 Hz and readable by everybody.
`freshness` counts refreshes: values read between two equal readings of it belong together. `startup` changes when the
blade's controller starts and its counters with it; `generation` when a power cap is set. cpu_energy, memory_energy and
accelN_energy lie inside `energy` (with much else): they are told as detail and never added.
Source: HPE Cray EX system monitoring guide, "Power monitoring counters".
"""

import time
from pathlib import Path

from hpc.energy.counters.base import MAX_PLAUSIBLE_W, WHOLE_NODE, Accumulator, Instrument, Reading, Scope
from hpc.energy.counters.sysfs import read_text

FOLDER = "sys/cray/pm_counters"
TRIES = 5
STILL_S = 10.0
"""A controller that has not refreshed for this long (a hundred refreshes) is told."""


class PmCounters(Instrument):
    """Node energy and power of a Cray EX node."""

    scope: Scope = "node"
    unit = "J"
    provenance = "measured: HPE Cray pm_counters (whole node, 10 Hz)"

    def __init__(self, folder: Path) -> None:
        super().__init__("pm_counters", WHOLE_NODE)
        self._folder = folder
        inside = sorted(path.name for path in folder.glob("*_energy"))
        self._sums = {name: Accumulator(MAX_PLAUSIBLE_W["node"]) for name in ("energy", *inside)}
        self._has = {name: (folder / name).exists() for name in ("startup", "generation")}
        self._power_w: float | None = None
        self._generation: str | None = None
        self._fresh, self._fresh_since, self._is_still = "", 0.0, False
        self.open()

    def _take(self, began: float) -> list[str]:
        values = self._together()
        ended = time.monotonic()
        self.epoch = values.get("startup")
        notes = []
        for name, accumulator in self._sums.items():
            if name not in values:
                continue
            note = accumulator.add(float(values[name]), began, ended, self.epoch)
            if note:
                notes.append(f"pm_counters {name} {note}")
        self._power_w = float(values["power"])
        return [*notes, *self._changes(values, began)]

    def _together(self) -> dict[str, str]:
        """The first words of all files, from one refresh. Raises OSError, ValueError."""
        optional = [name for name, is_there in self._has.items() if is_there]
        for _ in range(TRIES):
            before = self._word("freshness")
            values = {name: self._word(name) for name in ("energy", "power", *optional)}
            for name in [*self._sums][1:]:
                try:
                    values[name] = self._word(name)
                except (OSError, ValueError):  # a detail that went away is no reason to lose the node's energy
                    continue
            if self._word("freshness") == before:
                return {**values, "freshness": before}
        raise ValueError(f"its files changed during each of {TRIES} readings")

    def _word(self, name: str) -> str:
        words = read_text(self._folder / name).split()
        if not words:
            raise ValueError(f"{name} is empty")
        return words[0]

    def _changes(self, values: dict[str, str], now: float) -> list[str]:
        notes = []
        generation = values.get("generation")
        if self._generation is not None and generation != self._generation:
            notes.append("pm_counters generation changed: a power cap was set or lifted")
        self._generation = generation
        if values["freshness"] != self._fresh:
            self._fresh, self._fresh_since, self._is_still = values["freshness"], now, False
        elif now - self._fresh_since > STILL_S and not self._is_still:
            self._is_still = True
            notes.append(f"pm_counters have not been refreshed for {STILL_S:.0f} s: the node draws more than they show")
        return notes

    def _reading(self) -> Reading:
        total = self._sums["energy"]
        detail = {name: part.total_j for name, part in self._sums.items() if name != "energy"}
        return Reading(total.total_j, self._power_w, total.unsure_j, detail_j=detail)


def find(root: Path) -> tuple[list[PmCounters], list[str]]:
    """The node's counter, if this is a Cray node, and notes on why not."""
    folder = root / FOLDER
    if not (folder / "energy").exists():
        return [], []
    try:
        return [PmCounters(folder)], []
    except (OSError, ValueError) as error:
        return [], [f"/{FOLDER} is there but cannot be read ({error}): tell the site; everybody may read it elsewhere"]
