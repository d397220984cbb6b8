"""The time of a stage, cut into spans that each belong to one part: what the ledger and goodput both count with.

    queue       submitted, every stage it needs is done, and no attempt runs yet; or back in the queue
    start       processes, imports, inputs, the model, a checkpoint that is loaded
    compile     the engine is built and rehearses
    productive  steps that stayed, held-out loss, the artifact; all of a stage that does not train
    checkpoint  training stood still for a checkpoint that stayed
    replay      steps that did not stay: a later attempt, or the same one after a return to a checkpoint, did them again
    lost        the rest of an attempt after its last checkpoint that stayed: waiting for a rank that died, a start
                that led to no checkpoint, an attempt of a stage that has no checkpoints
    idle        between attempts while nothing was asked for; an attempt whose work is done

What stayed is decided from metrics.jsonl: an attempt that begins at step s + 1 resumed from the checkpoint of step s,
and every earlier row of a later step was thrown away; so was every row between a checkpoint and a return to it. For an
attempt that has ended and was not followed by another, the newest published checkpoint is what the next one would
resume from. While an attempt runs, all it does counts as staying.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from hpc.energy.samples import NodeSamples
from hpc.run.attempts import newest_step
from hpc.run.directory import StageDirectory, read_jsonl
from hpc.run.timeline import Change, read_timeline

PARTS = ("queue", "start", "compile", "productive", "checkpoint", "replay", "lost", "idle")


@dataclass(frozen=True)
class Span:
    """A stretch of time that belongs to one part."""

    attempt: int
    """0 between attempts."""
    start: float
    end: float
    part: str


@dataclass(frozen=True)
class Row:
    """A step that was logged."""

    step: int
    time: float
    tokens: int
    is_kept: bool
    is_return: bool
    """Whether the loop went back to a checkpoint after it."""


@dataclass(frozen=True)
class AttemptStory:
    """One attempt, as far as its records tell."""

    number: int
    start: float
    end: float
    """Its last sign of life."""
    is_over: bool
    nodes: tuple[str, ...]
    dead: tuple[str, ...]
    """Nodes that were declared dead under it."""
    reason: str
    """Why it ended, in the words of its records."""
    spans: tuple[Span, ...] = ()
    rows: tuple[Row, ...] = ()

    @property
    def thrown(self) -> list[Row]:
        """Steps that did not stay."""
        return [row for row in self.rows if not row.is_kept]


@dataclass(frozen=True)
class StageStory:
    """A stage: its attempts, and the time between them."""

    kind: str
    is_done: bool
    is_aside: bool
    """Whether it was made again: it is one of RUN/superseded."""
    attempts: tuple[AttemptStory, ...]
    gaps: tuple[Span, ...]

    @property
    def spans(self) -> list[Span]:
        """All of its time, without a hole, in order."""
        return sorted([*self.gaps, *(span for one in self.attempts for span in one.spans)], key=lambda s: s.start)


@dataclass
class _Attempt:
    """What is gathered about an attempt before it is judged."""

    begin: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Its lines of attempts.jsonl."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Its rows of metrics.jsonl."""
    changes: list[Change] = field(default_factory=list)
    samples: list[NodeSamples] = field(default_factory=list)

    @property
    def number(self) -> int:
        return int(self.begin["attempt"])

    @property
    def start(self) -> float:
        return min(float(self.begin["time"]), float(self.begin.get("born") or self.begin["time"]))

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self.begin.get("nodes") or (self.begin["host"],))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("event") == event]

    @property
    def last_sign(self) -> float:
        signs = [self.start, *(float(row["time"]) for row in self.of("end")), *(one.last for one in self.samples)]
        return max([*signs, *(float(row["time"]) for row in self.steps), *(one.time for one in self.changes)])

    @property
    def is_over(self) -> bool:
        told = bool(self.of("end") or self.of("verdict"))
        return told or (bool(self.samples) and all(one.has_end for one in self.samples))

    @property
    def reason(self) -> str:
        verdicts = [row["reason"] for row in self.of("verdict") if row.get("reason")]
        ends = [row["message"] for row in self.of("end") if row.get("message")]
        return str(next(iter(verdicts[-1:] or ends[:1]), "it ended without a word"))


def stage_story(stage_root: Path, samples: Sequence[NodeSamples]) -> StageStory:
    """Read the records of a stage; `samples` are those of `read_samples`."""
    directory = StageDirectory(stage_root)
    task, receipt = _json(directory.task), _json(directory.receipt)
    records = read_jsonl(directory.attempts)
    first, end = _own_attempts(stage_root, records)
    attempts = _gather(directory, records, samples, first, end)
    maker = int(receipt["attempts"]) if receipt else None
    is_aside = stage_root.parent.name == "superseded"
    kept = _kept_rows(attempts, newest_step(directory), maker, is_aside=is_aside)
    stories = [
        _judge(one, kept, attempts[index + 1].start if index + 1 < len(attempts) else None, maker, is_aside)
        for index, one in enumerate(attempts)
    ]
    gaps = _gaps(records, attempts, stories, _needs_done(stage_root, task), first)
    return StageStory(str(task.get("stage", {}).get("kind", "")), bool(receipt), is_aside, tuple(stories), tuple(gaps))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _own_attempts(stage_root: Path, records: list[dict[str, Any]]) -> tuple[int, float]:
    """The range of attempts that belong here: a stage that was set aside while a job ran shares its record with the
    stage that followed, and a line says where one ends."""
    first = 1
    for row in records:
        if row.get("event") == "superseded":
            if row["folder"] == stage_root.name and stage_root.parent.name == "superseded":
                return first, int(row["attempt"])
            first = int(row["attempt"])
    return first, float("inf")


def _gather(
    directory: StageDirectory,
    records: list[dict[str, Any]],
    samples: Sequence[NodeSamples],
    first: int,
    end: float,
) -> list[_Attempt]:
    found = {
        int(row["attempt"]): _Attempt(row)
        for row in records
        if row.get("event") == "start" and first <= int(row["attempt"]) < end
    }
    for row in records:
        if row.get("event") in ("end", "verdict", "node") and row["attempt"] in found:
            found[row["attempt"]].rows.append(row)
    for row in read_jsonl(directory.metrics):
        if "step" in row and row.get("attempt") in found:
            found[row["attempt"]].steps.append(row)
    for change in read_timeline(directory):
        if change.attempt in found:
            found[change.attempt].changes.append(change)
    for one in samples:
        if one.attempt not in found:  # an attempt that nobody recorded: its energy still counts
            begin = {"event": "start", "attempt": one.attempt, "time": one.start, "host": one.host}
            found[one.attempt] = _Attempt(begin)
        found[one.attempt].samples.append(one)
    return [found[number] for number in sorted(found)]


def _kept_rows(attempts: list[_Attempt], newest: int, maker: int | None, *, is_aside: bool) -> set[tuple[int, int]]:
    """(attempt, place among its rows) of every step that stayed.

    newest: step of the newest checkpoint on disk. maker: the attempt that wrote the receipt; later ones change nothing.
    """
    kept: list[tuple[int, int, int]] = []

    def throw_after(step: float) -> None:
        kept[:] = [row for row in kept if row[0] <= step]

    for index, one in enumerate(attempts):
        if maker is not None and one.number > maker:
            break
        if index:
            throw_after(int(one.steps[0]["step"]) - 1 if one.steps else int(one.begin.get("checkpoint") or -1))
        for place, row in enumerate(one.steps):
            back = row.get("rolled_back_to")
            if back is None:
                kept.append((int(row["step"]), one.number, place))
            else:
                throw_after(int(back))
    if attempts and maker is None and (attempts[-1].is_over or is_aside):
        throw_after(newest or -1)
    return {(number, place) for _, number, place in kept}


def _judge(
    one: _Attempt, kept: set[tuple[int, int]], next_start: float | None, maker: int | None, is_aside: bool
) -> AttemptStory:
    end = one.last_sign if next_start is None else max(one.start, min(one.last_sign, next_start))
    rows = tuple(
        Row(
            int(row["step"]),
            float(row["time"]),
            int(row.get("tokens") or 0),
            (one.number, place) in kept,
            "rolled_back_to" in row,
        )
        for place, row in enumerate(one.steps)
    )
    is_over = one.is_over or next_start is not None or is_aside
    stays = one.number == maker if maker is not None else not is_over
    story = AttemptStory(
        one.number, one.start, end, is_over, one.nodes, tuple(row["node"] for row in one.of("node")), one.reason,
        rows=rows,
    )  # fmt: skip
    if maker is not None and one.number > maker:
        return replace(story, spans=(Span(one.number, one.start, end, "idle"),))
    return replace(story, spans=tuple(_merged(_spans(story, one.changes, stays))))


def _spans(story: AttemptStory, changes: list[Change], stays: bool) -> Iterator[Span]:
    """Cut an attempt where its phase changes and where steps ended, and give each piece its part."""
    phases = [Change(story.number, story.start, "start"), *(c for c in changes if story.start < c.time < story.end)]
    if len(phases) == 1 and story.rows:  # no timeline was kept: it starts until its first row
        phases.append(Change(story.number, min(story.rows[0].time, story.end), "productive"))
    elif len(phases) == 1:
        phases = [replace(phases[0], phase="productive")]
    ends = [change.time for change in phases[1:]] + [story.end]
    kept_steps = {row.step for row in story.rows if row.is_kept}
    saves = {
        change.step: end
        for change, end in zip(phases, ends, strict=True)
        if change.phase == "checkpoint" and change.step in kept_steps
    }
    kept = [max(row.time, saves.get(row.step, row.time)) for row in story.rows if row.is_kept]
    until = float("inf") if stays else max(kept, default=float("-inf"))
    thrown = list(_thrown_intervals(story, phases, saves))
    cuts = {row.time for row in story.rows} | {start for start, _ in thrown} | {until}
    for change, end in zip(phases, ends, strict=True):
        inner = sorted(cut for cut in cuts if change.time < cut < end)
        for begin, stop in zip([change.time, *inner], [*inner, end], strict=True):
            is_thrown = any(low <= begin and stop <= high for low, high in thrown)
            yield Span(story.number, begin, stop, _part(change, begin, until, is_thrown, kept_steps))


def _merged(spans: Iterable[Span]) -> Iterator[Span]:
    """Neighbours of one part as one span: there may be a piece for every step."""
    for _, run in groupby(spans, key=lambda span: span.part):
        pieces = list(run)
        yield replace(pieces[0], end=pieces[-1].end)


def _part(change: Change, begin: float, until: float, is_thrown: bool, kept_steps: set[int]) -> str:
    if change.phase == "checkpoint" and change.step in kept_steps and begin < until:
        return "checkpoint"
    if is_thrown and (change.phase == "productive" or begin < until):
        return "replay"
    return change.phase if begin < until else "lost"


def _thrown_intervals(
    story: AttemptStory, phases: list[Change], saves: dict[int, float]
) -> Iterator[tuple[float, float]]:
    """From the row before (or its checkpoint, or the first phase that steps) to the row, for every step that did not
    stay."""
    before = next((change.time for change in phases if change.phase == "productive"), story.start)
    for row in story.rows:
        if row.is_kept:
            before = max(row.time, saves.get(row.step, row.time))
        else:
            yield before, row.time
            before = row.time


def _needs_done(stage_root: Path, task: dict[str, Any]) -> float:
    """When the last of what a stage needs was done; 0 when that is not known."""
    times = [0.0]
    for need in task.get("stage", {}).get("needs", []):
        rows = read_jsonl(StageDirectory(stage_root.parent.parent / "stages" / need).attempts)
        times += [float(row["time"]) for row in rows if row.get("event") == "end" and row["outcome"] == "done"]
    return max(times)


def _gaps(
    records: list[dict[str, Any]],
    attempts: list[_Attempt],
    stories: list[AttemptStory],
    needs_done: float,
    first: int,
) -> Iterator[Span]:
    """The time before the first attempt and between attempts."""
    submits = [float(row["time"]) for row in records if row.get("event") == "submit"]
    if stories and first == 1 and submits and submits[0] < stories[0].start:
        start = max(submits[0], min(needs_done, stories[0].start))
        yield Span(0, start, stories[0].start, "queue")
    for index in range(1, len(stories)):
        begin, end = stories[index - 1].end, stories[index].start
        if end <= begin:
            continue
        again = attempts[index].begin
        before = attempts[index - 1].begin
        is_requeue = bool(again.get("job")) and again.get("token") == before.get("token")
        asked = begin if is_requeue else min((t for t in submits if begin < t < end), default=end)
        if asked > begin:
            yield Span(0, begin, asked, "idle")
        if end > asked:
            yield Span(0, asked, end, "queue")
