"""A run as plain data: what the page, the comparison and the card are written from. Missing is None, never 0."""

from dataclasses import dataclass, field
from typing import Any, Literal

from hpc.config import Facility
from hpc.energy.footprint import Footprint, footprint
from hpc.energy.goodput import Goodput
from hpc.energy.ledger import RunLedger, StageLedger
from hpc.report.series import NodePower

State = Literal["done", "running", "silent", "stopped", "failed", "damaged", "not started"]
KINDS_OF_PROVENANCE = ("measured", "derived", "estimated")
MODELS = ("model", "quantized", "exported", "adapter")
"""Artifacts that hold weights."""
TRAINED = ("pretrain", "finetune", "relora")
"""Kinds of stages that train a whole model."""


@dataclass(frozen=True)
class AttemptSpan:
    """When an attempt began, when its last rank ended or was last heard of, and how it went."""

    number: int
    start: float
    end: float
    outcome: str
    """done, stopped, failed, or lost: it ended without a word."""
    reason: str
    """What its first failing rank said; empty where it is done."""
    nodes: int
    ranks: int


@dataclass(frozen=True)
class StageFacts:
    """One stage, as its receipt and its files tell it; most of it may be missing while it runs."""

    name: str
    kind: str
    produces: str
    needs: tuple[str, ...]
    state: State
    text: str
    """Where it is, or why it ended."""
    seconds: float | None = None
    """Wall time of the attempt that finished."""
    attempts: tuple[AttemptSpan, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    size_bytes: int | None = None
    digest: str | None = None
    code: dict[str, str | None] = field(default_factory=dict)
    ledger: StageLedger | None = None
    facility: Facility = field(default_factory=Facility)
    history: tuple[dict[str, Any], ...] = ()
    """Rows of metrics.jsonl, each step once."""
    power: tuple[NodePower, ...] = ()

    @property
    def energy_j(self) -> float | None:
        """Joules of all attempts and nodes; None when nothing was sampled."""
        return self.ledger.energy_j if self.ledger else None

    @property
    def energy_provenance(self) -> str:
        """Where the joules come from: an estimate, if any part is one, comes first."""
        sources = self.ledger.provenance if self.ledger else ()
        return "; ".join(sorted(dict.fromkeys(sources))) or "not measured"

    @property
    def node_hours(self) -> float | None:
        """Node-hours that were sampled."""
        return self.ledger.node_s / 3600 if self.ledger else None

    def footprint(self) -> Footprint | None:
        """Beyond the nodes; None when the joules are not known."""
        if self.ledger is None or self.ledger.energy_j is None:
            return None
        return footprint(self.ledger.energy_j, self.ledger.node_s / 3600, self.facility)


@dataclass(frozen=True)
class RunFacts:
    """A run."""

    name: str
    root: str
    written: float
    """When these facts were gathered, unix seconds."""
    code_version: str
    machine: str
    """The nodes, in words; empty when nothing tells."""
    stages: tuple[StageFacts, ...]
    """In the order of the chain."""
    ledger: RunLedger | None
    goodput: Goodput | None
    config: dict[str, Any] = field(default_factory=dict)
    """As it was asked for."""

    @property
    def chain(self) -> tuple[StageFacts, ...]:
        """The stages without those that only report."""
        return tuple(stage for stage in self.stages if stage.kind != "report")

    def stage(self, name: str) -> StageFacts:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def of_kind(self, *kinds: str) -> list[StageFacts]:
        """Stages of some kinds, in the order of the chain."""
        return [stage for stage in self.stages if stage.kind in kinds]

    def evaluations(self) -> list[dict[str, dict[str, dict[str, Any]]]]:
        """Tables model -> token set -> figures, of the `evaluate` stages that are done."""
        return [stage.metrics["models"] for stage in self.of_kind("evaluate") if "models" in stage.metrics]

    @property
    def energy_j(self) -> float | None:
        """Joules of all stages and of what they replaced."""
        return self.ledger.energy_j if self.ledger else None

    @property
    def is_estimated(self) -> bool:
        """Whether any of the joules is an estimate."""
        ledgers = self.ledger.stages if self.ledger else ()
        return any(source.startswith("estimated") for stage in ledgers for source in stage.provenance)

    @property
    def is_complete(self) -> bool:
        """Whether every node of every attempt reported its joules."""
        return self.ledger is not None and self.ledger.is_complete

    def lineage(self, stage: StageFacts) -> list[StageFacts]:
        """A stage and everything it was made from in this run, each once, in the order of the chain."""
        names = {stage.name}
        for other in reversed(self.stages):  # what comes later in the chain is never needed by what comes before
            if other.name in names:
                names.update(other.needs)
        return [other for other in self.stages if other.name in names]

    def lineage_j(self, stage: StageFacts) -> float | None:
        """Joules of a stage and of everything it was made from, each stage once; None when one is unknown."""
        return total([other.energy_j for other in self.lineage(stage)])


def provenance_kind(provenance: str | None) -> str:
    """measured, derived or estimated: the weakest that a text of sources names; empty when it names none."""
    named = {part.strip().split(":")[0] for part in (provenance or "").split(";")}
    return next((kind for kind in reversed(KINDS_OF_PROVENANCE) if kind in named), "")


def total(values: list[float | None]) -> float | None:
    """Their sum; None when one of them is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None
