"""The cover rule: from all counters that a node has, those that together cover most of it and no part twice.

node > module > grace > package + dram + gpu. Larger scopes go first, because they include what nobody measures inside
(regulators, fans, the network card); at equal scope a counter of joules goes before a meter that must be integrated.
A counter is taken if none of its parts may be a part of one that was taken. So on GH200, where NVML's energy counter
covers the whole module, the Grace meters beside it are left out; and RAPL's `psys`, `core` and `uncore` never get here.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from hpc.energy.counters.base import Part, Scope

ORDER: tuple[Scope, ...] = ("node", "module", "grace", "package", "cpu", "dram", "sysio", "gpu", "cpu+dram")


class Covering(Protocol):
    """The part of a counter's interface that the rule looks at."""

    @property
    def name(self) -> str: ...
    @property
    def scope(self) -> Scope: ...
    @property
    def parts(self) -> frozenset[Part]: ...
    @property
    def unit(self) -> str: ...


C = TypeVar("C", bound=Covering)


def cover(found: Sequence[C]) -> tuple[list[C], list[str]]:
    """The counters to add up, and a note for each that is left out because another contains or overlaps it."""
    taken: list[C] = []
    notes: list[str] = []
    for counter in sorted(found, key=_rank):
        over = next((other for other in taken if overlap(counter.parts, other.parts)), None)
        if over is None:
            taken.append(counter)
        else:
            notes.append(f"{counter.name} is not added: {over.name} covers it")
    return sorted(taken, key=found.index), notes


def overlap(some: Iterable[Part], others: Iterable[Part]) -> bool:
    """Whether any part may be in both."""
    others = list(others)
    return any(part.overlaps(other) for part in some for other in others)


def _rank(counter: Covering) -> tuple[int, bool, str]:
    return ORDER.index(counter.scope), counter.unit.endswith("W"), counter.name
