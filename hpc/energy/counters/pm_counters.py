"""HPE Cray pm_counters: the energy of a whole node, accelerators and network included.

Files of /sys/cray/pm_counters hold `<integer> J <microseconds> us`, refreshed at 10 Hz and readable by everybody.
`freshness` counts refreshes: values read between two equal readings of it belong together. `startup` changes when the
blade's controller starts and its counters with it; `generation` when a power cap is set. cpu_energy, memory_energy and
accelN_energy lie inside `energy` (with much else): they are told as detail and never added.
Source: HPE Cray EX system monitoring guide, "Power monitoring counters".
"""

import time
from contextlib import suppress
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
        self._total = Accumulator(MAX_PLAUSIBLE_W["node"])
        self._inside = {path.name: Accumulator(MAX_PLAUSIBLE_W["node"]) for path in sorted(folder.glob("*_energy"))}
        self._marks = [name for name in ("startup", "generation") if (folder / name).exists()]
        self._power_w: float | None = None
        self._generation: str | None = None
        self._fresh, self._fresh_since, self._is_still = "", 0.0, False
        self.open()

    def _take(self, began: float) -> list[str]:
        marks, joules, inside = self._together()
        ended = time.monotonic()
        self.epoch = marks.get("startup")
        note = self._total.add(joules, began, ended, self.epoch)
        self._power_w = inside.pop("power", self._total.power_w)
        for name, value in inside.items():
            with suppress(ValueError):  # a note would say nothing that the total's does not
                self._inside[name].add(value, began, ended, self.epoch)
        return [*([f"{self.name} {note}"] if note else []), *self._changes(marks, began)]

    def _together(self) -> tuple[dict[str, str], float, dict[str, float]]:
        """Marks, joules of the node, and what can be had beside them, all from one refresh. Raises OSError, ValueError.

        A file beside `energy` that went away or shows no number is no reason to lose the node's joules.
        """
        for _ in range(TRIES):
            marks = {name: self._word(name) for name in ("freshness", *self._marks)}
            joules = float(self._word("energy"))
            inside: dict[str, float] = {}
            for name in ("power", *self._inside):
                with suppress(OSError, ValueError):
                    inside[name] = float(self._word(name))
            if self._word("freshness") == marks["freshness"]:
                return marks, joules, inside
        raise ValueError(f"its files changed during each of {TRIES} readings")

    def _word(self, name: str) -> str:
        words = read_text(self._folder / name).split()
        if not words:
            raise ValueError(f"{name} is empty")
        return words[0]

    def _changes(self, marks: dict[str, str], now: float) -> list[str]:
        notes = []
        generation = marks.get("generation")
        if self._generation is not None and generation != self._generation:
            notes.append("pm_counters generation changed: a power cap was set or lifted")
        self._generation = generation
        if marks["freshness"] != self._fresh:
            self._fresh, self._fresh_since, self._is_still = marks["freshness"], now, False
        elif now - self._fresh_since > STILL_S and not self._is_still:
            self._is_still = True
            notes.append(f"pm_counters have not been refreshed for {STILL_S:.0f} s: the node draws more than they show")
        return notes

    def _reading(self) -> Reading:
        detail = {name: part.total_j for name, part in self._inside.items()}
        return Reading(self._total.total_j, self._power_w, self._total.unsure_j, detail_j=detail)


def find(root: Path) -> tuple[list[PmCounters], list[str]]:
    """The node's counter, if this is a Cray node, and notes on why not."""
    folder = root / FOLDER
    if not (folder / "energy").exists():
        return [], []
    try:
        return [PmCounters(folder)], []
    except (OSError, ValueError) as error:
        return [], [f"/{FOLDER} is there but cannot be read ({error}): tell the site; everybody may read it elsewhere"]
