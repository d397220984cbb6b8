"""Which source of a mixture a global sample number takes: a schedule that is a pure function of the number.

Among the first n samples each source has less than one sample more or fewer than weight x n, for every n. That is the
"chairman assignment problem"; R. Tijdeman (Discrete Mathematics 32, 1980) solves it by always serving, among the
sources that may be served without getting too far ahead, the one whose deadline comes first. Weights are taken as the
decimal numbers that they are written as, so the schedule repeats after as many samples as their common denominator
(10 for 0.7 and 0.3): one period is a table, and any sample number is a look-up in it.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hpc.config.mixture import mixture_parts


class Schedule:
    """The schedule of a mixture with these weights, which need not add up to one."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.table, self._before = _period(tuple(weights))

    def draw(self, samples: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Source of each sample number, and how many samples of that source come before it."""
        period = np.uint64(len(self.table))
        periods, places = samples // period, samples % period
        sources = self.table[places]
        return sources, periods * self._before[-1][sources] + self._before[places, sources]

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first `num_samples` each source gives."""
        periods, place = divmod(num_samples, len(self.table))
        return [periods * int(whole) + int(part) for whole, part in zip(self._before[-1], self._before[place],
                                                                         strict=True)]  # fmt: skip


@lru_cache(maxsize=8)
def _period(weights: tuple[float, ...]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Sources of one period, (P,), and counts of each before each place and at the end, (P + 1, sources)."""
    parts = mixture_parts(weights)
    period = sum(parts)
    slack = max(1, 2 * len(parts) - 2)
    table = np.empty(period, np.int64)
    before = np.zeros((period + 1, len(parts)), np.uint64)
    given = [0] * len(parts)
    for place in range(period):
        owed = [part * (place + 1) - count * period for part, count in zip(parts, given, strict=True)]
        ready = [number for number, value in enumerate(owed) if value * slack >= period or len(parts) == 1]
        chosen = min(ready, key=lambda number: ((slack - 1) * period - slack * owed[number]) / parts[number])
        table[place] = chosen
        given[chosen] += 1
        before[place + 1] = given
    return table, before
