"""Goodput: which part of the time, and of the energy, made something that stayed.

The parts (hpc/energy/spans.py says what each means) add up to the wall time: of a stage from its submission, or from
when what it needs was done, to the end of its last attempt; of a run from its first stage to its last. Where stages of
a run overlap, each moment is shared evenly among those that hold nodes; a stage in the queue counts only while none
does, and a moment in which there is neither is idle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import fsum
from pathlib import Path

from hpc.energy.curves import NodeSamples, read_samples
from hpc.energy.ledger import run_stages, span_joules
from hpc.energy.spans import PARTS, Span, StageStory, stage_story

__all__ = ["PARTS", "Goodput", "run_goodput", "stage_goodput"]

HOLDS_NO_NODES = ("queue", "idle")


@dataclass(frozen=True)
class Goodput:
    """Where time and energy went."""

    wall_s: float
    seconds: dict[str, float]
    """Part -> seconds; they add up to wall_s."""
    energy_j: dict[str, float | None]
    """Part -> joules of all nodes in it. None: it lasted, but nothing was measured or estimated in it."""

    @property
    def goodput(self) -> float:
        """Productive seconds / wall time."""
        return self.seconds["productive"] / self.wall_s if self.wall_s else 0.0


def stage_goodput(stage_root: Path) -> Goodput | None:
    """Goodput of one stage over all its attempts; None before its first."""
    samples = read_samples(stage_root)
    story = stage_story(stage_root, samples)
    spans = story.spans
    if not story.attempts:
        return None
    seconds = {part: fsum(s.end - s.start for s in spans if s.part == part) for part in PARTS}
    return Goodput(spans[-1].end - spans[0].start, seconds, _joules([(story, samples)], seconds))


def run_goodput(run_root: Path) -> Goodput | None:
    """Goodput of a run over all its stages, superseded ones (all lost) among them; None before its first attempt."""
    told = []
    for root in run_stages(run_root):
        samples = read_samples(root)
        story = stage_story(root, samples)
        if story.attempts:
            told.append((_lost_when_aside(story), samples))
    spans = [span for story, _ in told for span in story.spans]
    if not spans:
        return None
    seconds = dict.fromkeys(PARTS, 0.0)
    edges = sorted({edge for span in spans for edge in (span.start, span.end)})
    for begin, end in pairwise(edges):
        open_now = [span.part for span in spans if span.start <= begin and end <= span.end]
        parts = [part for part in open_now if part not in HOLDS_NO_NODES] or _waiting(open_now)
        for part in parts:
            seconds[part] += (end - begin) / len(parts)
    return Goodput(edges[-1] - edges[0], seconds, _joules(told, seconds))


def _lost_when_aside(story: StageStory) -> StageStory:
    """Of a superseded stage nothing stayed, whatever it was doing."""
    if not story.is_aside:
        return story

    def lost(span: Span) -> Span:
        return span if span.part == "replay" else replace(span, part="lost")

    attempts = tuple(replace(one, spans=tuple(map(lost, one.spans))) for one in story.attempts)
    return replace(story, attempts=attempts)


def _waiting(parts: Sequence[str]) -> list[str]:
    return ["queue"] if "queue" in parts else ["idle"]


def _joules(
    stages: Sequence[tuple[StageStory, Sequence[NodeSamples]]], seconds: dict[str, float]
) -> dict[str, float | None]:
    """Joules of every part. Nodes that are not held draw nothing for us: between attempts it is 0."""
    joules: dict[str, float | None] = dict.fromkeys(PARTS, 0.0)
    unknown: set[str] = set()
    for story, samples in stages:
        for attempt in story.attempts:
            mine = [one for one in samples if one.attempt == attempt.number and one.has_total]
            for span in attempt.spans:
                if mine:
                    drawn = fsum(span_joules(one, span, attempt.spans) for one in mine)
                    joules[span.part] = (joules[span.part] or 0.0) + drawn
                elif span.end > span.start:
                    unknown.add(span.part)
    return {part: None if part in unknown and not value else value for part, value in joules.items()}
