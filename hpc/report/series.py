"""Long series made short enough for a page: power thinned while it is read, curves thinned evenly, pauses cut out.

A sampler writes a line a second: a day on 64 nodes is five million. A figure draws at most `POINTS` of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
POINTS = 12_000
"""Points of one figure, over all its curves."""
POINTS_PER_CURVE = 1_500
LINES_PARSED = 6_000
"""Lines of one energy file that are parsed at most; beyond it every second, third, ... one is."""
LINE_BYTES = 150
"""The shortest line that a sampler writes."""


@dataclass(frozen=True)
class NodePower:
    """What one node drew in one attempt: means over equal spans of time."""

    host: str
    attempt: int
    times: tuple[float, ...]
    """Middle of each span, unix seconds."""
    watts: tuple[float, ...]
    span_s: float
    """Length of a span; 0 where every sample is kept."""


class Thinner:
    """Takes (time, value) in the order of time and keeps means over equal spans: when there are more than `limit`, the
    spans double."""

    def __init__(self, limit: int) -> None:
        self._limit, self._span = limit, 0.0
        self._sums: dict[int, tuple[float, float, int]] = {}
        self._first = 0.0

    def add(self, time: float, value: float) -> None:
        """Take a sample."""
        if not self._sums:
            self._first = time
            self._span = 0.5
        self._put(time, value, 1)
        while len(self._sums) > self._limit:
            self._span *= 2
            old, self._sums = self._sums, {}
            for times, values, count in old.values():
                self._put(times / count, values / count, count)

    def _put(self, time: float, value: float, count: int) -> None:
        place = int((time - self._first) / self._span)
        times, values, already = self._sums.get(place, (0.0, 0.0, 0))
        self._sums[place] = (times + time * count, values + value * count, already + count)

    def means(self) -> tuple[tuple[float, ...], tuple[float, ...], float]:
        """Times, values, and the length of a span in seconds (0: nothing was merged)."""
        rows = self._sums.values()
        merged = any(count > 1 for _, _, count in rows)
        return tuple(t / n for t, _, n in rows), tuple(v / n for _, v, n in rows), self._span if merged else 0.0


def read_power(stage_root: Path) -> tuple[NodePower, ...]:
    """Power of every node and attempt of a stage, thinned while it is read: memory does not grow with the run."""
    paths = sorted(stage_root.glob("energy-*.jsonl"))
    limit = max(60, min(POINTS_PER_CURVE, POINTS // max(1, len(paths))))
    found: list[NodePower] = []
    for path in paths:
        curves: dict[int, Thinner] = {}
        step = 1 + path.stat().st_size // LINE_BYTES // LINES_PARSED
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if number % step and b'"sample"' in line:
                    continue
                row = _row(line)
                if row is not None and row.get("total_power_w") is not None:
                    curve = curves.setdefault(int(row["attempt"]), Thinner(limit))
                    curve.add(float(row["time"]), float(row["total_power_w"]))
        host = path.stem.removeprefix("energy-")
        found += [NodePower(host, attempt, *curve.means()) for attempt, curve in curves.items()]
    return tuple(found)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # torn by a kill
        return None
    return row if isinstance(row, dict) else None


def evenly(rows: Sequence[T], limit: int = POINTS_PER_CURVE) -> list[T]:
    """At most `limit` of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= limit:
        return list(rows)
    step = (len(rows) - 1) / (limit - 1)
    return [rows[round(number * step)] for number in range(limit)]


class Clock:
    """Unix time as minutes on an axis, with long pauses (a queue, a night) cut down to a gap."""

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        """spans: from, to of everything that will be drawn."""
        merged: list[list[float]] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        busy = sum(end - start for start, end in merged)
        self.longest_gap = max(5.0, 0.03 * busy)
        self._pieces: list[tuple[float, float, float]] = []
        self.cuts: list[tuple[float, float]] = []
        """Minutes on the axis, seconds that were cut out there."""
        place = 0.0
        for start, end in merged:
            if self._pieces:
                gap = start - self._pieces[-1][1]
                if gap > 2 * self.longest_gap:
                    self.cuts.append(((place + self.longest_gap / 2) / 60, gap))
                    gap = self.longest_gap
                place += gap
            self._pieces.append((start, end, place))
            place += end - start
        self.length = place / 60
        """Minutes of the whole axis."""

    def minutes(self, time: float) -> float:
        """Where a time is on the axis."""
        piece = next((p for p in reversed(self._pieces) if p[0] <= time), self._pieces[0])
        return (piece[2] + min(time, piece[1]) - piece[0]) / 60
