"""What the samplers of a stage wrote, as curves: joules of one node in one attempt as a function of time.

A sampler counts from zero and appends to energy-HOST.jsonl (hpc/energy/sampler.py). Between two samples energy is
taken to grow evenly: a cut through a second is off by less than what a node draws in it.

Joules are rounded to 1/1024 J. Sums of such numbers are exact in floating point up to 2 GWh, whatever their order, so
that parts add up to their total to the last digit.

A day of one node is 86,400 lines, and few of them matter: those beside a cut, and the last one. So a file is only
scanned for its lines, and a sample is parsed when somebody asks for it.
"""

import json
import mmap
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path
from typing import Any

from hpc.run.directory import read_jsonl

GRAIN = 1024.0
PLAIN = b'{"event": "sample", "attempt": '
"""How the sampler begins a sample; a line that begins otherwise is parsed at once."""


def grain(joules: float) -> float:
    """Joules rounded to 1/1024 J."""
    return round(joules * GRAIN) / GRAIN


class _Lines:
    """Whole lines of a file as they are now."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            has_text = path.stat().st_size > 0
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if has_text else b""

    def offsets(self) -> Iterable[tuple[int, bytes]]:
        """(offset, line) of every line that is whole; a killed writer leaves one that is not."""
        begin = 0
        while (end := self._text.find(b"\n", begin)) >= 0:
            line = self._text[begin:end]
            if line and line.count(b"{") == line.count(b"}"):
                yield begin, line
            begin = end + 1

    def row(self, offset: int) -> dict[str, Any]:
        """The line at an offset."""
        value: dict[str, Any] = json.loads(self._text[offset : self._text.find(b"\n", offset)])
        return value


@dataclass
class _Group:
    """The lines of one sampler."""

    start: dict[str, Any]
    offsets: "array[int]" = field(default_factory=lambda: array("Q"))
    """Of its samples, the end line among them."""
    notes: list[dict[str, Any]] = field(default_factory=list)


class Curve:
    """Time and joules at the start line (0) and at every sample (1 to n)."""

    def __init__(self, lines: _Lines, start: float, offsets: "array[int]") -> None:
        self._lines, self._start, self._offsets = lines, start, offsets
        self._known: dict[int, tuple[float, float | None]] = {0: (start, 0.0)}

    def __len__(self) -> int:
        return len(self._offsets) + 1

    def time(self, index: int) -> float:
        """Unix seconds."""
        return self._point(index)[0]

    def joules(self, index: int) -> float:
        """Since the start line; a sample without a total stands where the one before stood."""
        while (value := self._point(index)[1]) is None:
            index -= 1
        return value

    def after(self, time: float) -> int:
        """The first index that is later than a time; the length when there is none."""
        return bisect_right(range(len(self)), time, key=self.time)

    def until(self, time: float) -> "Curve":
        """The part up to a time."""
        return Curve(self._lines, self._start, self._offsets[: max(0, self.after(time) - 1)])

    def _point(self, index: int) -> tuple[float, float | None]:
        if index not in self._known:
            row = self._lines.row(self._offsets[index - 1])
            total = row.get("total_energy_j")
            self._known[index] = float(row["time"]), None if total is None else grain(float(total))
        return self._known[index]

    @property
    def last_row(self) -> dict[str, Any]:
        """The last sample."""
        return self._lines.row(self._offsets[-1])

    @property
    def has_total(self) -> bool:
        """Whether any sample has one."""
        return any(self._point(index)[1] is not None for index in range(len(self) - 1, 0, -1))


@dataclass(frozen=True)
class NodeSamples:
    """One run of a sampler: one node in one attempt."""

    attempt: int
    host: str
    curve: Curve
    start: float
    """Time of the start line, unix seconds."""
    last: float
    """Time of the last sample, whatever it holds."""
    has_total: bool
    """Whether any sample had a total: every counter could be read."""
    has_end: bool
    """Whether the sampler wrote its end line."""
    by_counter: dict[str, float | None]
    """Joules of each counter at its last sample; None for one that could not be read."""
    provenance: tuple[str, ...]
    scopes: dict[str, str]
    """Counter -> what it covers."""
    unsure_j: float
    """At most so many joules more were drawn, where a counter was silent or wrapped unseen."""
    notes: tuple[str, ...]
    """What the sampler had to say: what it cannot measure, who else uses the node, a counter that restarted."""

    @property
    def energy_j(self) -> float | None:
        """All of it; None when no counter gave a total."""
        return self.curve.joules(len(self.curve) - 1) if self.has_total else None

    def at(self, time: float) -> float:
        """Joules from the start line until then; constant before and after the samples."""
        curve, after = self.curve, self.curve.after(time)
        if after == 0:
            return 0.0
        if after == len(curve):
            return curve.joules(after - 1)
        before, then = curve.time(after - 1), curve.time(after)
        part = (time - before) / (then - before)
        return grain(curve.joules(after - 1) + part * (curve.joules(after) - curve.joules(after - 1)))

    def between(self, start: float, end: float) -> float:
        """Joules drawn from `start` to `end`."""
        return self.at(end) - self.at(start)

    def seconds(self, start: float, end: float) -> float:
        """Seconds of that interval in which the node was sampled."""
        return max(0.0, min(end, self.last) - max(start, self.start))


def read_samples(stage_root: Path) -> list[NodeSamples]:
    """Everything that the samplers of a stage wrote, by host and time.

    An attempt that a newer one has replaced may live on beside it (a lost slurmd): on a host where both were sampled
    the older one counts until the newer one began, so that no joule counts twice.
    """
    found: list[NodeSamples] = []
    for path in sorted(stage_root.glob("energy-*.jsonl")):
        lines = _Lines(path)
        groups = _groups(lines)
        begins = sorted(float(group.start["time"]) for group in groups)
        for group in groups:
            begin = float(group.start["time"])
            curve, has_end = Curve(lines, begin, group.offsets), False
            if len(curve) > 1:
                has_end = curve.last_row["event"] == "end"
            later = begins[bisect_right(begins, begin) :]
            if later and len(curve) > 1 and curve.time(len(curve) - 1) > later[0]:
                curve, has_end = curve.until(later[0]), True
            if len(curve) > 1:
                found.append(_node_samples(path.stem.removeprefix("energy-"), group, curve, has_end=has_end))
    return found


def total_j(samples: Iterable[NodeSamples]) -> float | None:
    """Joules of some nodes together; None when nothing was measured or estimated."""
    known = [one.energy_j for one in samples if one.energy_j is not None]
    return fsum(known) if known else None


def power_series(stage_root: Path) -> list[tuple[float, str, int, float]]:
    """(unix time, host, attempt, watts) of every sample, in the order of time."""
    series = [
        (float(row["time"]), path.stem.removeprefix("energy-"), int(row["attempt"]), float(row["total_power_w"]))
        for path in stage_root.glob("energy-*.jsonl")
        for row in read_jsonl(path)
        if row.get("total_power_w") is not None
    ]
    return sorted(series)


def _groups(lines: _Lines) -> list[_Group]:
    """Lines of each sampler: a start line and what follows it of its attempt."""
    groups: list[_Group] = []
    newest: dict[int, _Group] = {}
    for offset, line in lines.offsets():
        if line.startswith(PLAIN):
            group = newest.get(int(line[len(PLAIN) : line.index(b",", len(PLAIN))]))
            if group is not None:
                group.offsets.append(offset)
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row.get("event") == "start":
            newest[int(row["attempt"])] = group = _Group(row)
            groups.append(group)
        elif (group := newest.get(int(row.get("attempt", 0)))) is not None:
            if row.get("event") == "note":
                group.notes.append(row)
            elif row.get("event") in ("sample", "end"):
                group.offsets.append(offset)
    return groups


def _node_samples(host: str, group: _Group, curve: Curve, *, has_end: bool) -> NodeSamples:
    last, counters = curve.last_row, group.start.get("counters", [])
    uncovered = ", ".join(group.start.get("unmeasured", []))
    notes = [*group.start.get("notes", []), *([f"not counted: {uncovered}"] if uncovered else [])]
    notes += [row["text"] for row in group.notes]
    return NodeSamples(
        attempt=int(group.start["attempt"]),
        host=host,
        curve=curve,
        start=float(group.start["time"]),
        last=float(last["time"]),
        has_total=curve.has_total,
        has_end=has_end,
        by_counter=dict(last["energy_j"]),
        provenance=tuple(dict.fromkeys(counter["provenance"] for counter in counters)),
        scopes={counter["name"]: counter["scope"] for counter in counters if "scope" in counter},
        unsure_j=float(last.get("unsure_j") or 0.0),
        notes=tuple(dict.fromkeys(str(note) for note in notes)),
    )
