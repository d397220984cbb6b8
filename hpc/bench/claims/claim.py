"""The frame of an audited claim: what is said, by whom, from which figures, by which arithmetic, and what follows.

A claim is audited so that a reader can check it by hand. Every figure that goes in is a premise with a source, or with
'assumed' in front of it. Every step shows its line with the numbers in it: who types that line into a calculator gets
the value beside it (a test does). What was measured here carries its provenance. The verdict is one of four, with its
reason in a sentence, and says what it depends on.

A new entry is a new file in this folder with an `ENTRY` in it; nothing else has to be touched.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.config import Machine

Kind = Literal["run here", "on paper"]
Verdict = Literal["holds", "holds if", "does not hold here", "cannot be told"]

ARTICLE = (
    "the article on greener AI (TeckNexus, 'Smaller, Faster, Greener: Cutting-Edge AI Models Do More with Less', "
    "tecknexus.com/5g-network/smaller-faster-greener-cutting-edge-ai-models-do-more-with-less)"
)
QUOTED = f"{ARTICLE}, as quoted in this project's task: the stored copy that could be read ends before this claim"


@dataclass(frozen=True)
class Premise:
    """One figure that the arithmetic starts from."""

    name: str
    value: float
    unit: str
    source: str
    """Where it was read; or 'assumed: ...' with the reason."""


@dataclass(frozen=True)
class Step:
    """One line of arithmetic."""

    name: str
    line: str
    """The formula with its numbers: + - x / ^ and brackets, ln and sqrt."""
    value: float
    unit: str


@dataclass(frozen=True)
class Measured:
    """One figure measured here; None where there is none."""

    name: str
    value: float | None
    unit: str
    provenance: str
    """'measured: ...', 'derived: ...' or 'estimated: ...'."""


@dataclass(frozen=True)
class Claim:
    """A claim and its audit."""

    name: str
    statement: str
    said_by: str
    kind: Kind
    verdict: Verdict
    because: str
    """The verdict in a few sentences, with its figures; after 'holds if' they begin with the condition."""
    depends_on: tuple[str, ...]
    premises: tuple[Premise, ...] = ()
    arithmetic: tuple[Step, ...] = ()
    measured: tuple[Measured, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Bench:
    """What an audit may ask of the bench that calls it."""

    machine: Callable[[str], Machine]
    """The machine of a site of configs/sites, by the site's name."""
    folder: Path
    """Where real runs may keep their run directories."""
    quick: bool = False
    """Whether real runs are cut to what takes two minutes together."""
    tell: Callable[[str], None] = lambda text: None
    """Hears what a long audit is doing."""


@dataclass(frozen=True)
class Entry:
    """One claim, ready to be audited."""

    name: str
    statement: str
    kind: Kind
    audit: Callable[[Bench], Claim]
