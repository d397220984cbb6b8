"""What the samplers of a stage wrote, as curves: joules of one node in one attempt as a function of time.

A sampler counts from zero and appends to energy-HOST.jsonl (hpc/energy/sampler.py). Between two samples energy is
taken to grow evenly: a cut through a second is off by less than what a node draws in it.

Joules are rounded to 1/1024 J. Sums of such numbers are exact in floating point up to 2 GWh, whatever their order, so
that parts add up to their total to the last digit.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

from hpc.run.directory import read_jsonl

GRAIN = 1024.0


def grain(joules: float) -> float:
    """Joules rounded to 1/1024 J."""
    return round(joules * GRAIN) / GRAIN


@dataclass(frozen=True)
class NodeSamples:
    """One run of a sampler: one node in one attempt."""

    attempt: int
    host: str
    times: tuple[float, ...]
    """Of the start line and of every sample whose total is known, unix seconds, ascending."""
    joules: tuple[float, ...]
    """At these times, since the start line; it never falls."""
    last: float
    """Time of the last line, whatever it holds."""
    has_total: bool
    """Whether any sample had a total: every counter could be read."""
    has_end: bool
    """Whether the sampler wrote its end line."""
    by_counter: dict[str, float | None]
    """Joules of each counter at its last sample; None for one that was never read."""
    provenance: tuple[str, ...]
    scopes: dict[str, str]
    """Counter -> what it covers."""
    unsure_j: float
    """At most so many joules more were drawn, where a counter was silent or wrapped unseen."""
    notes: tuple[str, ...]
    """What the sampler had to say: what it cannot measure, who else uses the node, a counter that restarted."""

    @property
    def start(self) -> float:
        """Time of the start line."""
        return self.times[0]

    @property
    def energy_j(self) -> float | None:
        """All of it; None when no counter gave a total."""
        return self.joules[-1] if self.has_total else None

    def at(self, time: float) -> float:
        """Joules from the start line until then; constant before and after the samples."""
        after = bisect_right(self.times, time)
        if after == 0:
            return 0.0
        if after == len(self.times):
            return self.joules[-1]
        before, then = self.times[after - 1], self.times[after]
        part = (time - before) / (then - before)
        return grain(self.joules[after - 1] + part * (self.joules[after] - self.joules[after - 1]))

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
        groups = _groups(read_jsonl(path))
        begins = sorted(float(rows[0]["time"]) for rows in groups)
        for rows in groups:
            later = [begin for begin in begins if begin > float(rows[0]["time"])]
            one = _node_samples(path.stem.removeprefix("energy-"), rows, later[0] if later else None)
            if one is not None:
                found.append(one)
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


def _groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of each sampler: a start line and the samples of its attempt that follow it."""
    groups: list[list[dict[str, Any]]] = []
    newest: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        attempt = int(row.get("attempt", 0))
        if row.get("event") == "start":
            newest[attempt] = [row]
            groups.append(newest[attempt])
        elif row.get("event") in ("sample", "end", "note") and attempt in newest:
            newest[attempt].append(row)
    return groups


def _node_samples(host: str, rows: list[dict[str, Any]], until: float | None) -> NodeSamples | None:
    """The curve of one sampler, None when it wrote no sample (before `until`)."""
    begin, start = rows[0], float(rows[0]["time"])
    seen = [row for row in rows[1:] if until is None or float(row["time"]) <= until]
    samples = [row for row in seen if row["event"] != "note"]
    if not samples:
        return None
    times, joules, by_counter = [start], [0.0], dict[str, float | None]()
    for row in samples:
        by_counter.update({name: value for name, value in row["energy_j"].items() if value is not None})
        by_counter.update({name: None for name in row["energy_j"] if name not in by_counter})
        total = row.get("total_energy_j")
        if total is None:
            continue
        if float(row["time"]) > times[-1]:
            times.append(float(row["time"]))
            joules.append(joules[-1])
        joules[-1] = max(joules[-1], grain(float(total)))
    counters = begin.get("counters", [])
    notes = [*begin.get("notes", []), *(row["text"] for row in seen if row["event"] == "note")]
    return NodeSamples(
        attempt=int(begin["attempt"]),
        host=host,
        times=tuple(times),
        joules=tuple(joules),
        last=float(samples[-1]["time"]),
        has_total=any(row.get("total_energy_j") is not None for row in samples),
        has_end=rows[-1].get("event") == "end" or len(seen) < len(rows) - 1,
        by_counter=by_counter,
        provenance=tuple(dict.fromkeys(counter["provenance"] for counter in counters)),
        scopes={counter["name"]: counter["scope"] for counter in counters if "scope" in counter},
        unsure_j=float(samples[-1].get("unsure_j") or 0.0),
        notes=tuple(dict.fromkeys(str(note) for note in notes)),
    )
