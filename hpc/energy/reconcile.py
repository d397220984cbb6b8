"""Figures of other sources beside the ledger's own: they check it, and are never mixed into it."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import fsum
from typing import Protocol


@dataclass(frozen=True)
class Reconciled:
    """Another source's figure beside ours."""

    name: str
    theirs_j: float | None
    ours_j: float | None
    note: str
    """What the other source covers, and why it may differ."""

    @property
    def difference_j(self) -> float | None:
        """Theirs - ours."""
        return None if self.theirs_j is None or self.ours_j is None else self.theirs_j - self.ours_j


class CounterEnergy(Protocol):
    """What is needed of a node in an attempt (hpc.energy.ledger.NodeEnergy)."""

    @property
    def by_counter(self) -> dict[str, float | None]: ...
    @property
    def scopes(self) -> dict[str, str]: ...


def scope_joules(nodes: Iterable[CounterEnergy], scope: str) -> float | None:
    """Joules of all counters of one scope; None when no node has one."""
    known = [
        joules
        for node in nodes
        for name, joules in node.by_counter.items()
        if node.scopes.get(name) == scope and joules is not None
    ]
    return fsum(known) if known else None


def with_wandb(nodes: Iterable[CounterEnergy], theirs_j: float | None) -> Reconciled:
    """W&B's own monitor beside our GPU counters. nodes: those that W&B watched; theirs_j: its `gpu.N.energyJoules`."""
    ours = scope_joules(nodes, "gpu")
    note = "W&B reads the same counter of its node's GPUs at longer intervals: it lacks up to one at each end"
    return Reconciled("W&B GPU counters", theirs_j, ours, note)
