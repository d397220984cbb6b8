"""What every counter gives, and how a raw figure becomes joules through wraps, restarts, gaps and failed readings.

A cumulative counter shows joules since some moment of its own. It may wrap at the end of its range, restart (a driver
or a controller that was loaded again), stand still, or not answer. Between two readings it can tell less than what was
drawn, never more; so `energy_j` is what is certain, and `unsure_j` bounds what may be missing on top of it. A meter
that shows only watts is integrated, and a gap between its readings is not filled.
"""

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, Protocol

Scope = Literal["node", "module", "grace", "package", "dram", "sysio", "gpu", "cpu+dram", "cpu"]
"""How much a counter covers, in words. Which parts of the node these are is in `Counter.parts`."""

Kind = Literal["cpu", "dram", "sysio", "gpu", "rest"]

MAX_PLAUSIBLE_W: dict[Scope, float] = {
    "node": 50_000.0, "module": 10_000.0, "grace": 3_000.0, "package": 3_000.0, "dram": 3_000.0, "sysio": 3_000.0,
    "gpu": 5_000.0,
}  # fmt: skip
"""More than twice what any such part of today draws. A step that implies more is no energy: a wrap that was none, or
a wild value."""

SLACK_S = 0.2
"""Counters are refreshed at 5 Hz or faster: two values in a row may be this much further apart than our clock says."""

MAX_GAP_S = 10.0
"""The longest time between two readings of a power meter over which their mean is taken for what happened."""

STALE_S = 2.0
"""A reading older than this is no longer what the counter draws now."""


@dataclass(frozen=True)
class Part:
    """One part of a node, or all that fit where a field is left open.

    `socket` None: of whichever socket. `index` "": all of this kind there.
    """

    kind: Kind
    socket: int | None = None
    index: str = ""

    def overlaps(self, other: "Part") -> bool:
        """Whether both may mean the same hardware. What is not known counts as the same: never add twice."""
        same_socket = self.socket is None or other.socket is None or self.socket == other.socket
        same_index = not self.index or not other.index or self.index == other.index
        return self.kind == other.kind and same_socket and same_index


WHOLE_NODE = frozenset(Part(kind) for kind in ("cpu", "dram", "sysio", "gpu", "rest"))


@dataclass(frozen=True)
class Reading:
    """Since the counter object was made."""

    energy_j: float | None
    """Joules that were certainly drawn; None when the counter could not be read so far."""

    power_w: float | None
    """Watts, mean since the reading before, or the instrument's own figure; None when unknown now."""

    unsure_j: float = 0.0
    """At most so many joules more were drawn and not seen (a restart, wraps in a long gap)."""

    stale_s: float = 0.0
    """Seconds since the counter last answered; 0 when it just did."""

    notes: tuple[str, ...] = ()
    """What happened since the reading before, one line each."""

    detail_j: dict[str, float] = field(default_factory=dict)
    """Joules of parts inside this counter's scope. Never to be added to it."""


class Counter(Protocol):
    """One source of energy figures."""

    name: str
    scope: Scope
    parts: frozenset[Part]
    """What of the node it covers. The cover rule takes no two counters whose parts overlap."""
    unit: str
    """Of the raw figure: 'J', 'mJ', 'uJ', 'uW', ..."""
    wrap_j: float | None
    """Where the raw figure starts again, J; None when it does not."""
    epoch: str | None
    """Names the stretch of time the raw figure counts in; a change is a restart. None when the source has no such."""
    provenance: str
    """'measured: ...' or 'estimated: ...', as shown to users."""

    def read(self) -> Reading:
        """Read it now. Never raises: a reading that fails leaves the energy where it was and is noted."""
        ...


@dataclass(frozen=True)
class Step:
    """What two readings of a cumulative counter say about the time between them."""

    energy_j: float
    unsure_j: float = 0.0
    note: str = ""


def step_between(last_j: float, value_j: float, limit_j: float, wrap_j: float | None, new_epoch: bool = False) -> Step:
    """Joules from a reading to the next. `limit_j`: more than this cannot have been drawn in the time between.

    A fall is a wrap if the counter has a range and the wrap is plausible, otherwise a restart: the counter shows what
    was drawn since, and what was drawn before it in this interval is not known. The result is never negative.
    """
    step = value_j - last_j
    if new_epoch and not value_j > limit_j >= step >= 0:  # a value that large has not grown from zero in this time
        return _restart(value_j, limit_j, "restarted (its epoch changed)")
    if step < 0 and wrap_j is not None and 0 <= step + wrap_j <= limit_j:
        step += wrap_j
    if step < 0:
        return _restart(value_j, limit_j, f"fell from {last_j:.0f} J to {value_j:.0f} J, taken for a restart")
    if step > limit_j:
        return Step(0.0, limit_j, f"rose by {step:.0f} J where at most {limit_j:.0f} J are possible: not counted")
    missed = math.floor((limit_j - step) / wrap_j) if wrap_j else 0
    if missed and wrap_j:
        text = f"was not read for so long that up to {missed} wraps of {wrap_j:.0f} J may be missing"
        return Step(step, missed * wrap_j, text)
    return Step(step)


def _restart(value_j: float, limit_j: float, what: str) -> Step:
    counted = value_j if value_j <= limit_j else 0.0
    return Step(counted, limit_j - counted, f"{what}: up to {limit_j - counted:.0f} J before it were not seen")


@dataclass
class Accumulator:
    """Joules from a cumulative counter that may wrap or restart."""

    max_w: float
    """More than this the counter cannot show."""
    wrap_j: float | None = None
    total_j: float = 0.0
    unsure_j: float = 0.0
    power_w: float | None = None
    _last_j: float | None = field(default=None, repr=False)
    _epoch: str | None = field(default=None, repr=False)
    _began: float = field(default=0.0, repr=False)

    def add(self, value_j: float, began: float, ended: float, epoch: str | None = None) -> str:
        """Take a raw value that was read between two moments (monotonic seconds). Returns a note, mostly empty.

        Raises ValueError for a value that is none. A process may be suspended between the clock and the counter: the
        longest time that fits is what a step is judged by.
        """
        if not math.isfinite(value_j) or value_j < 0:
            raise ValueError(f"{value_j} is not a counter's value")
        note = ""
        if self._last_j is not None:
            limit = self.max_w * (ended - self._began + SLACK_S)
            is_new = epoch is not None and self._epoch is not None and epoch != self._epoch
            step = step_between(self._last_j, value_j, limit, self.wrap_j, is_new)
            self.total_j += step.energy_j
            self.unsure_j += step.unsure_j
            note = step.note
            if began > self._began:
                self.power_w = step.energy_j / (began - self._began)
        self._last_j, self._epoch, self._began = value_j, epoch, began
        return note


class Instrument(ABC):
    """What all counters share: reading never raises, and a failure is told once, its end too."""

    scope: Scope
    unit: str
    provenance: str
    wrap_j: float | None = None
    epoch: str | None = None

    def __init__(self, name: str, parts: frozenset[Part]) -> None:
        self.name, self.parts = name, parts
        self._good: float | None = None
        self._is_failing = False

    def open(self) -> None:
        """The first reading, from which joules are counted. Raises what the source raises."""
        began = time.monotonic()
        self._take(began)
        self._good = began

    def read(self) -> Reading:
        """What came together since `open`."""
        began = time.monotonic()
        try:
            notes = self._take(began)
        except Exception as error:  # a vendor's library may raise anything; the sampler must go on
            notes = [] if self._is_failing else [f"{self.name} cannot be read: {first_line(error)}"]
            self._is_failing = True
        else:
            if self._is_failing and self._good is not None:
                notes = [f"{self.name} answers again after {began - self._good:.0f} s", *notes]
            self._good, self._is_failing = began, False
        stale = 0.0 if not self._is_failing else began - (self._good if self._good is not None else began)
        reading = self._reading()
        power = reading.power_w if stale < STALE_S else None
        energy = None if self._good is None else reading.energy_j
        return Reading(energy, power, reading.unsure_j, stale, tuple(notes), reading.detail_j)

    @abstractmethod
    def _take(self, began: float) -> list[str]:
        """Read the source; may raise anything. Returns notes."""

    @abstractmethod
    def _reading(self) -> Reading:
        """Energy, power, what is unsure, detail."""


class CumulativeCounter(Instrument):
    """A counter of joules."""

    def __init__(self, name: str, parts: frozenset[Part]) -> None:
        super().__init__(name, parts)
        self._sum = Accumulator(MAX_PLAUSIBLE_W[self.scope], self.wrap_j)

    @abstractmethod
    def _joules(self) -> float:
        """The raw figure in joules; sets `epoch` where there is one."""

    def _take(self, began: float) -> list[str]:
        value = self._joules()
        note = self._sum.add(value, began, time.monotonic(), self.epoch)
        return [f"{self.name} {note}"] if note else []

    def _reading(self) -> Reading:
        return Reading(self._sum.total_j, self._sum.power_w, self._sum.unsure_j)


class PowerMeter(Instrument):
    """A meter of watts, integrated by the mean of neighbouring readings. A long gap is left open and said."""

    def __init__(self, name: str, parts: frozenset[Part]) -> None:
        super().__init__(name, parts)
        self._energy_j = self._unsure_j = 0.0
        self._last: tuple[float, float] | None = None

    @abstractmethod
    def _watts(self) -> float:
        """The raw figure in watts."""

    def _take(self, began: float) -> list[str]:
        watts, most = self._watts(), MAX_PLAUSIBLE_W[self.scope]
        if not 0 <= watts <= most:
            raise ValueError(f"{watts} W is not a {self.scope}'s power")
        notes = []
        if self._last is not None:
            seconds = began - self._last[0]
            if seconds <= MAX_GAP_S:
                self._energy_j += seconds * (watts + self._last[1]) / 2
            else:
                self._unsure_j += seconds * most
                notes.append(f"{self.name} shows only power and was not read for {seconds:.0f} s: nothing counted")
        self._last = began, watts
        return notes

    def _reading(self) -> Reading:
        return Reading(self._energy_j, self._last[1] if self._last else None, self._unsure_j)


def first_line(error: Exception) -> str:
    """An error as part of a note."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
