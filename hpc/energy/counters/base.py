"""What every counter gives, and how a cumulative one is read through wraps and restarts."""

import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

Scope = Literal["node", "package", "dram", "gpu", "cpu+dram"]
"""What a counter covers. `node` contains all others; the rest do not overlap."""

MAX_PLAUSIBLE_W = 50_000.0
"""More than any single counter can draw; a 'wrap' that implies more is a restart."""


@dataclass(frozen=True)
class Reading:
    """Since the counter object was made."""

    energy_j: float | None
    """Joules; None when the counter could not be read so far."""

    power_w: float | None
    """Watts, mean since the reading before, or the instrument's own figure; None when unknown."""


class Counter(Protocol):
    """One source of energy figures."""

    name: str
    scope: Scope
    provenance: str
    """'measured: ...' or 'estimated: ...', as shown to users."""

    def read(self) -> Reading:
        """Read it now. Never raises: a reading that fails leaves the energy where it was."""
        ...


@dataclass
class Accumulator:
    """Joules from a cumulative counter that may wrap or restart.

    A value below the last one is a wrap when the counter has a range and the energy it implies is plausible for the
    time that passed; otherwise the counter restarted, and what it shows is counted from zero. Never negative.
    """

    wrap_j: float | None = None
    """Value at which the counter starts again, J; None when it does not wrap."""
    total_j: float = 0.0
    power_w: float | None = None
    _last_j: float | None = field(default=None, repr=False)
    _last_time: float = field(default=0.0, repr=False)

    def add(self, value_j: float, now: float | None = None) -> None:
        """Take a raw reading (J, at `now` in monotonic seconds)."""
        now = time.monotonic() if now is None else now
        if self._last_j is not None:
            seconds = now - self._last_time
            step = value_j - self._last_j
            if step < 0:
                wrapped = step + self.wrap_j if self.wrap_j is not None else -1.0
                plausible = 0 <= wrapped <= MAX_PLAUSIBLE_W * max(seconds, 1e-3)
                step = wrapped if plausible else max(0.0, value_j)
            self.total_j += step
            self.power_w = step / seconds if seconds > 0 else self.power_w
        self._last_j, self._last_time = value_j, now

    def reading(self) -> Reading:
        """What has come together; no energy before the first raw reading."""
        return Reading(None if self._last_j is None else self.total_j, self.power_w)
