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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest
from pathlib import Path

from hpc.energy.curves import NodeSamples
from hpc.energy.records import AttemptRecords, StageRecords, read_records
from hpc.run.timeline import Change

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


def stage_story(stage_root: Path, samples: Sequence[NodeSamples], finishing: int | None = None) -> StageStory:
    """Judge the records of a stage; `samples` are those of `read_samples`, `finishing` the attempt that is about to
    write the receipt."""
    told = read_records(stage_root, samples, finishing)
    kept = _kept_rows(told)
    starts = [one.start for one in told.attempts[1:]]
    stories = [_judge(one, kept, start, told) for one, start in zip_longest(told.attempts, starts)]
    gaps = tuple(_gaps(told, stories))
    return StageStory(told.kind, told.maker is not None, told.is_aside, tuple(stories), gaps)


def _kept_rows(told: StageRecords) -> set[tuple[int, int]]:
    """(attempt, place among its rows) of every step that stayed. Attempts after the one with the receipt change
    nothing."""
    kept: list[tuple[int, int, int]] = []

    def throw_after(step: float) -> None:
        kept[:] = [row for row in kept if row[0] <= step]

    for index, one in enumerate(told.attempts):
        if told.maker is not None and one.number > told.maker:
            break
        if index:
            throw_after(int(one.steps[0]["step"]) - 1 if one.steps else int(one.begin.get("checkpoint") or -1))
        for place, row in enumerate(one.steps):
            back = row.get("rolled_back_to")
            if back is None:
                kept.append((int(row["step"]), one.number, place))
            else:
                throw_after(int(back))
    if told.attempts and told.maker is None and (told.attempts[-1].is_over or told.is_aside):
        throw_after(told.newest_checkpoint or -1)
    return {(number, place) for _, number, place in kept}


def _judge(
    one: AttemptRecords, kept: set[tuple[int, int]], next_start: float | None, told: StageRecords
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
    is_over = one.is_over or next_start is not None or told.is_aside
    stays = one.number == told.maker if told.maker is not None else not is_over
    story = AttemptStory(
        one.number, one.start, end, is_over, one.nodes, tuple(row["node"] for row in one.of("node")), one.reason,
        rows=rows,
    )  # fmt: skip
    if told.maker is not None and one.number > told.maker:
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


def _gaps(told: StageRecords, stories: Sequence[AttemptStory]) -> Iterator[Span]:
    """The time before the first attempt and between attempts."""
    submits = told.submits
    if stories and submits and submits[0] < stories[0].start:
        start = max(submits[0], min(told.eligible, stories[0].start))
        yield Span(0, start, stories[0].start, "queue")
    for index in range(1, len(stories)):
        begin, end = stories[index - 1].end, stories[index].start
        if end <= begin:
            continue
        before, again = told.attempts[index - 1].begin, told.attempts[index].begin
        is_requeue = bool(again.get("job")) and again.get("token") == before.get("token")
        asked = begin if is_requeue else min((t for t in submits if begin < t < end), default=end)
        if asked > begin:
            yield Span(0, begin, asked, "idle")
        if end > asked:
            yield Span(0, asked, end, "queue")
