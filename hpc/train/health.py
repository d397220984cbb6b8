"""What all ranks know before an update, what is a bad step, and what a checkpoint keeps of it.

Before every update the ranks add up one vector (`agree`): everybody's loss, everybody's seconds, and whether somebody
asked to stop. So they decide alike, and the slow rank and the one with the NaN have names.

A step is bad when the loss of any rank is not finite, when it spikes (OLMo's rule: above mean + sigma x deviation of
the last steps), or when the gradient norm is not finite. The first two are known before the update, and the gradients
are spoilt on purpose (`Engine.step(drop=True)`); the norm is known to DeepSpeed alone, inside its step, and there ZeRO
1, 2 and 3 leave the weights as they are and say so afterwards (tests/train/test_health.py). No rank updates either way.

`Record` is all the memory this needs. It is part of every checkpoint (`health.json`): a resumed run judges the next
loss by the same window, and a bad batch that a return to a checkpoint has left behind stays behind, because the place
of a step in the data is a function of the step and of the record.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpc.config import Health
from hpc.errors import StageError
from hpc.run.task import World

RECORD = "health.json"
"""In a checkpoint."""

HEALTH_PROVENANCE = {
    "skipped_steps": "measured: steps whose update was left out",
    "rollbacks": "measured: returns to a checkpoint because of a bad step",
    "peak_memory_bytes": "measured: largest rank, most of the last attempt (resident on a CPU, allocated on a GPU)",
    "rank_step_median_s": "measured: compute time of a step without waiting, median over ranks, last attempt",
    "rank_step_p99_s": "measured: the same, 99th percentile over ranks",
    "rank_step_p99_over_median": "derived: how much slower the slow ranks are",
    "slowest_rank": "measured: rank with the longest mean step",
    "slowest_node": "measured: its node",
}


@dataclass(frozen=True)
class Word:
    """What all ranks know before an update."""

    losses: list[float]
    """Mean loss of each rank's micro-batches."""
    seconds: list[float]
    """What each rank computed for, without its waiting."""
    stop: bool
    """Whether some rank was asked to stop."""
    is_spent: bool = False
    """Whether rank 0 found the energy budget spent."""

    @property
    def loss(self) -> float:
        """Mean over ranks."""
        return math.fsum(self.losses) / len(self.losses) if all(map(math.isfinite, self.losses)) else math.nan


def agree(loss: Tensor, seconds: float, stop: bool, is_spent: bool, world: World) -> Word:
    """Tell the other ranks and hear them: one all-reduce of 2 x ranks + 2 numbers. Collective.

    loss: a scalar on the device of the process group.
    """
    mine = torch.zeros(2 * world.size + 2, device=loss.device)
    mine[world.rank] = loss
    mine[world.size + world.rank] = seconds
    mine[-2], mine[-1] = float(stop), float(is_spent)
    dist.all_reduce(mine)
    heard = mine.tolist()
    return Word(heard[: world.size], heard[world.size : -2], heard[-2] > 0, heard[-1] > 0)


@dataclass
class Record:
    """What health remembers, as of a step."""

    losses: list[float] = field(default_factory=list)
    """Of the last good steps, at most `window` of them."""
    skipped: list[int] = field(default_factory=list)
    """Steps whose update was skipped, counted from 1."""
    data_left_out: list[list[int]] = field(default_factory=list)
    """Ranges [first, end) of places in the data, in ascending order, that no step reads any more."""

    def place(self, step: int) -> int:
        """Where in the data a step (from 0) reads: the step's number, past everything that is left out."""
        place = step
        for first, end in self.data_left_out:
            if place >= first:
                place += end - first
        return place

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """The record in a checkpoint; an empty one where there is none."""
        path = folder / RECORD
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()


class Guard:
    """Judges steps, and counts what it may do about the bad ones."""

    def __init__(self, settings: Health, lr: float) -> None:
        self.settings, self.lr = settings, lr
        self.record = Record()

    def objection(self, word: Word) -> str | None:
        """Why an update must not happen, in words; None when nothing speaks against it. Pure, alike on all ranks."""
        odd = [str(rank) for rank, loss in enumerate(word.losses) if not math.isfinite(loss)]
        if odd:
            return f"the loss is not finite on rank {', '.join(odd)}"
        window = self.record.losses
        if len(window) < self.settings.window or len(window) < 2:
            return None
        mean = math.fsum(window) / len(window)
        deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in window) / (len(window) - 1))
        if word.loss <= mean + self.settings.spike_sigma * deviation:
            return None
        return f"the loss {word.loss:.4g} is a spike (the last {len(window)}: {mean:.4g} +- {deviation:.2g})"

    def accept(self, loss: float) -> None:
        """Remember a good step."""
        self.record.losses = [*self.record.losses, loss][-self.settings.window :]

    def skip(self, step: int, why: str) -> None:
        """Count a skipped step (from 1). Raises StageError when there are too many."""
        self.record.skipped.append(step)
        recent = sum(skipped > step - self.settings.window for skipped in self.record.skipped)
        if recent > self.settings.max_skipped:
            raise StageError(
                f"step {step}: {why}: lower train.optimizer.lr = {self.lr:g}; {recent} of the last "
                f"{min(step, self.settings.window)} updates are skipped, train.health.max_skipped allows "
                f"{self.settings.max_skipped}; the checkpoints before are intact"
            )

    def leave_out(self, checkpoint: int, step: int, why: str) -> None:
        """From now on no step reads the data between a checkpoint and a bad step (from 1), nor that of the step.

        Raises StageError when the stage has gone back too often.
        """
        allowed = self.settings.max_rollbacks
        if len(self.record.data_left_out) >= allowed:
            raise StageError(
                f"step {step}: {why}: lower train.optimizer.lr = {self.lr:g}; the stage went back to a checkpoint "
                f"{allowed} times, as often as train.health.max_rollbacks allows; the checkpoints are intact"
            )
        place = self.record.place
        self.record.data_left_out = [*self.record.data_left_out, [place(checkpoint), place(step - 1) + 1]]

    @property
    def counts(self) -> dict[str, int]:
        """For the receipt."""
        return {"skipped_steps": len(self.record.skipped), "rollbacks": len(self.record.data_left_out)}

    @property
    def words(self) -> str:
        """For the status line; empty while all is well."""
        named = [f"{name.replace('_', ' ')}: {count}" for name, count in self.counts.items() if count]
        return f" ({', '.join(named)})" if named else ""


class StepTimes:
    """Who is slow: seconds that each rank computed for, compared over many steps."""

    def __init__(self, nodes: list[str]) -> None:
        self.nodes = nodes
        self.clear()

    def clear(self) -> None:
        """Begin a new comparison."""
        self.total_s, self.steps = [0.0] * len(self.nodes), 0

    def add(self, seconds: list[float]) -> None:
        """One step, every rank's seconds."""
        self.total_s = [total + more for total, more in zip(self.total_s, seconds, strict=True)]
        self.steps += 1

    def report(self) -> dict[str, Any]:
        """Median and 99th percentile over ranks of their mean step, and the slowest rank with its node."""
        means = [total / max(1, self.steps) for total in self.total_s]
        slowest = max(range(len(means)), key=means.__getitem__)
        median, p99 = statistics.median(means), sorted(means)[math.ceil(0.99 * len(means)) - 1]
        return {
            "rank_step_median_s": median,
            "rank_step_p99_s": p99,
            "rank_step_p99_over_median": p99 / median if median else None,
            "slowest_rank": slowest,
            "slowest_node": self.nodes[slowest],
        }


def clock(device: str) -> Callable[[], float]:
    """Seconds that this thread ran or waited for a core: neither grows while it waits for another rank.

    Linux tells both in schedstat. Where it does not, and on accelerators, whose work the host's clock cannot see, wall
    time is taken; it holds the waits for others inside expert parallelism and ZeRO 3.
    """
    path = Path("/proc/thread-self/schedstat")
    if device != "cpu" or not path.exists():
        return time.monotonic
    return lambda: sum(map(int, path.read_text().split()[:2])) / 1e9


def nodes_of(world: World) -> list[str]:
    """Node of every rank. Collective."""
    nodes: list[Any] = [None] * world.size
    dist.all_gather_object(nodes, world.node)
    return [str(node) for node in nodes]
