"""Every joule of a run, and what became of it: per stage, attempt and node, useful apart from lost.

    total = useful + lost, to the last digit, for every stage and for the run

Lost is what made nothing that stayed: steps that were done again (`replayed_steps`), what an attempt drew after its
last checkpoint that a later one resumed from (`failed_attempt`; all of it where a stage has no checkpoints), and
stages that a changed configuration made again (`superseded`). hpc/energy/spans.py says which second is which.

A total is complete when every node of every attempt reported to the end. A node that was killed counts up to its last
sample; where that lies more than GAP_S before the end of its attempt, the total is incomplete and names the node.
Nothing is ever filled in: what is missing is `None` or named, not guessed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Literal

from hpc.energy.curves import NodeSamples, power_series, read_samples, total_j
from hpc.energy.lineage import Inherited, inherited
from hpc.energy.reconcile import Reconciled
from hpc.energy.spans import AttemptStory, Row, Span, StageStory, stage_story
from hpc.run.directory import StageDirectory
from hpc.run.receipt import read_receipt

__all__ = ["Inherited", "LostWork", "NodeEnergy", "Reconciled", "RunLedger", "StageLedger", "power_series",
           "run_ledger", "run_stages", "stage_ledger"]  # fmt: skip

GAP_S = 5.0
"""A node whose samples end this much before its attempt is missing something."""
LATE_S = 60.0
"""A node whose samples begin this much after its attempt is too; processes may take long to start."""

LossKind = Literal["failed_attempt", "replayed_steps", "superseded"]


@dataclass(frozen=True)
class NodeEnergy:
    """One node in one attempt."""

    attempt: int
    host: str
    start: float
    """Unix seconds of the first sample."""
    end: float
    """Of the last one."""
    energy_j: float | None
    """None when no counter of the node could be read."""
    complete: bool
    """Whether the sampler wrote its end line."""
    by_counter: dict[str, float | None]
    provenance: tuple[str, ...]
    """'measured: ...' or 'estimated: ...'."""
    scopes: dict[str, str]
    """Counter -> what it covers: node, package, gpu, ..."""
    unsure_j: float
    """At most so many joules more were drawn, where a counter was silent; 0 where none was."""
    notes: tuple[str, ...]
    """What the sampler had to say: what it cannot measure, who else uses the node, a counter that restarted."""


@dataclass(frozen=True)
class LostWork:
    """Energy that made nothing that stayed."""

    kind: LossKind
    attempt: int
    energy_j: float | None
    node_s: float
    """Node-seconds that were sampled in it."""
    steps: int | None
    """Steps that were done again; None where none were."""
    tokens: int | None
    reason: str


@dataclass(frozen=True)
class StageLedger:
    """One stage over all its attempts and nodes."""

    name: str
    """'pretrain (superseded 1)' for one that was made again."""
    kind: str
    energy_j: float | None
    """None when nothing was measured or estimated."""
    useful_j: float | None
    lost_j: float | None
    node_s: float
    """Node-seconds that were sampled."""
    tokens: int | None
    """Tokens that stayed; None for a stage that counts none."""
    nodes: tuple[NodeEnergy, ...]
    lost: tuple[LostWork, ...]
    missing: tuple[str, ...]
    """What the total lacks, in words; empty: it is complete."""
    provenance: tuple[str, ...]


@dataclass(frozen=True)
class RunLedger:
    """A run: the sum of its stages, and what it started from."""

    run: str
    stages: tuple[StageLedger, ...]
    inherited: tuple[Inherited, ...]
    reconciled: tuple[Reconciled, ...] = ()

    @property
    def energy_j(self) -> float | None:
        """All stages, superseded ones too; without what was inherited."""
        return _sum(stage.energy_j for stage in self.stages)

    @property
    def useful_j(self) -> float | None:
        """What made something that stayed."""
        return _sum(stage.useful_j for stage in self.stages)

    @property
    def lost_j(self) -> float | None:
        """The rest."""
        return _sum(stage.lost_j for stage in self.stages)

    @property
    def node_s(self) -> float:
        """Node-seconds that were sampled."""
        return fsum(stage.node_s for stage in self.stages)

    @property
    def missing(self) -> tuple[str, ...]:
        """What the total lacks, with the stage in front."""
        return tuple(f"{stage.name}: {words}" for stage in self.stages for words in stage.missing)

    @property
    def is_complete(self) -> bool:
        """Whether every node of every attempt reported to the end."""
        return not self.missing

    @property
    def inherited_j(self) -> float | None:
        """The stated shares of what this run started from."""
        return _sum(None if one.energy_j is None else one.energy_j * one.share for one in self.inherited)


def stage_ledger(stage_root: Path, finishing: int | None = None) -> StageLedger:
    """The ledger of one stage, also while it runs. finishing: the attempt that is about to write the receipt."""
    samples = read_samples(stage_root)
    story = stage_story(stage_root, samples, finishing)
    is_aside = stage_root.parent.name == "superseded"
    lost = [work for attempt in story.attempts for work in _lost(attempt, samples, is_aside)]
    energy = total_j(samples)
    lost_j = fsum(work.energy_j or 0.0 for work in lost)
    return StageLedger(
        name=_shown_name(stage_root),
        kind=story.kind,
        energy_j=energy,
        useful_j=None if energy is None else energy - lost_j,
        lost_j=None if energy is None else lost_j,
        node_s=fsum(one.last - one.start for one in samples),
        tokens=0 if is_aside else _tokens(stage_root, story),
        nodes=tuple(_node_energy(one) for one in sorted(samples, key=lambda one: (one.attempt, one.host))),
        lost=tuple(lost),
        missing=tuple(words for attempt in story.attempts for words in _missing(attempt, samples)),
        provenance=tuple(dict.fromkeys(source for one in samples for source in one.provenance)),
    )


def run_stages(run_root: Path) -> list[Path]:
    """Folders of all stages of a run, superseded ones after those that stand."""
    folders = [*(run_root / "stages").glob("*"), *(run_root / "superseded").glob("*")]
    begun = {path: StageDirectory(path).attempts for path in folders if path.is_dir()}
    return sorted(begun, key=lambda path: (path.parent.name, _age(begun[path]), path.name))


def run_ledger(run_root: Path) -> RunLedger:
    """The ledger of a run; of one in progress, as far as it has come."""
    folders = run_stages(run_root)
    return RunLedger(run_root.name, tuple(stage_ledger(path) for path in folders), inherited(run_root))


def _age(attempts: Path) -> float:
    """When a stage began, for an order in which a person reads; unknown comes last."""
    try:
        with attempts.open(encoding="utf-8") as file:
            words = file.readline().partition('"time": ')[2]
        return float(words.split(",")[0].rstrip("}\n"))
    except (OSError, ValueError):
        return float("inf")


def _shown_name(stage_root: Path) -> str:
    if stage_root.parent.name != "superseded":
        return stage_root.name
    name, _, number = stage_root.name.rpartition("-")
    return f"{name} (superseded {number})"


def _sum(values: Iterable[float | None]) -> float | None:
    """Sum of what is known; None when nothing is."""
    known = [value for value in values if value is not None]
    return fsum(known) if known else None


def _node_energy(one: NodeSamples) -> NodeEnergy:
    return NodeEnergy(
        one.attempt, one.host, one.start, one.last, one.energy_j, one.has_end, one.by_counter, one.provenance,
        one.scopes, one.unsure_j, one.notes,
    )  # fmt: skip


def span_joules(one: NodeSamples, span: Span, spans: Sequence[Span]) -> float:
    """Joules of a node in a span of its attempt. The first span reaches back to the first sample and the last one on
    to the last, so that the spans of an attempt add up to all of it."""
    start = float("-inf") if span is spans[0] else span.start
    end = float("inf") if span is spans[-1] else span.end
    return one.between(start, end)


def _lost(attempt: AttemptStory, samples: Sequence[NodeSamples], is_aside: bool) -> list[LostWork]:
    """What of an attempt did not stay; of a superseded stage that is everything."""
    groups: dict[LossKind, list[Span]] = {}
    for span in attempt.spans:
        kind = _loss_kind(span.part, is_aside)
        if kind is not None:
            groups.setdefault(kind, []).append(span)
    mine = [one for one in samples if one.attempt == attempt.number and one.has_total]
    found = []
    for kind, spans in groups.items():
        thrown = attempt.thrown if kind == "replayed_steps" else []
        found.append(
            LostWork(
                kind=kind,
                attempt=attempt.number,
                energy_j=fsum(span_joules(one, s, attempt.spans) for one in mine for s in spans) if mine else None,
                node_s=fsum(one.seconds(s.start, s.end) for one in mine for s in spans),
                steps=sum(row.step > 0 for row in thrown) or None,
                tokens=sum(row.tokens // row.step for row in thrown if row.step) if thrown else None,
                reason=_reason(attempt, kind, thrown),
            )
        )
    return found


def _loss_kind(part: str, is_aside: bool) -> LossKind | None:
    if part == "replay":
        return "replayed_steps"
    if part == "lost":
        return "failed_attempt"
    return "superseded" if is_aside else None


def _reason(attempt: AttemptStory, kind: LossKind, thrown: Sequence[Row]) -> str:
    if kind == "superseded":
        return "made again from another configuration or other inputs"
    if thrown and thrown[-1].is_return:
        return "the loss or the gradients were bad: back to a checkpoint and past the data"
    return attempt.reason


def _tokens(stage_root: Path, story: StageStory) -> int | None:
    """Tokens of the newest step that stayed, or what the receipt says."""
    rows = [row for attempt in story.attempts for row in attempt.rows]
    if rows:
        return max((row.tokens for row in rows if row.is_kept), default=0)
    receipt = read_receipt(StageDirectory(stage_root)) if story.is_done else None
    tokens = receipt.metrics.get("tokens") if receipt else None
    return tokens if isinstance(tokens, int) else None


def _missing(attempt: AttemptStory, samples: Sequence[NodeSamples]) -> list[str]:
    """What the total lacks of one attempt, in words."""
    found = []
    for node in attempt.nodes:
        mine = [one for one in samples if one.attempt == attempt.number and one.host == node]
        dead = " (declared dead)" if node in attempt.dead else ""
        where = f"attempt {attempt.number}: node {node}{dead}"
        if not mine:
            if attempt.end - attempt.start > GAP_S:
                found.append(f"{where} reported nothing")
            continue
        first, last = min(one.start for one in mine), max(one.last for one in mine)
        if not any(one.has_total for one in mine):
            found.append(f"{where} has no energy counter that can be read")
        if not any(one.has_end for one in mine) and attempt.end - last > GAP_S:
            found.append(f"{where} reported until {attempt.end - last:.0f} s before the attempt ended")
        if first - attempt.start > LATE_S:
            found.append(f"{where} reported from {first - attempt.start:.0f} s after the attempt began")
    return found
