"""Which tokens a rank sees at a step: a pure function of (seed, step, rank, world), so a position is one number.

A source's token stream is cut into windows of seq_len + 1 tokens that overlap by one (inputs and targets). They cross
document boundaries, which an end-of-text token marks; with document masking the positions of a window start again at 0
at every document start inside it, by the index of the store, so that a model attends to no earlier document. Each epoch
of a source visits every window once, in an order given by a keyed permutation (hpc/data/permutation.py), so no index
file is needed and a seek is free. Which source a sample takes is a schedule (hpc/data/mixture.py). The order over the
whole job does not depend on the number of ranks.

Shape letters: A micro-batches of a step, B sequences of a micro-batch, S seq_len.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc.data.mixture import Schedule
from hpc.data.permutation import permute
from hpc.data.store import TokenStore
from hpc.errors import DataError

BLOCK = 512
"""Samples whose windows a rank computes at a time: numpy's overhead is shared by so many."""

IGNORED = -100
"""A target without a loss, as in torch's cross-entropy."""

Window = tuple[TokenStore, int]
"""A store and the number of a window in it."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads."""

    ids: NDArray[np.int64]
    """Tokens, (B, S + 1): inputs and, shifted by one, targets."""

    positions: NDArray[np.int64] | None
    """Position of each input in its document or, for the first one, in the window, (B, S); None without masking."""

    answers: NDArray[np.bool_] | None = None
    """Targets that count, (B, S); None when all do."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """What follows each input, (B, S); IGNORED where it does not count."""
        following = self.ids[:, 1:]
        return following if self.answers is None else np.where(self.answers, following, IGNORED)


@dataclass(frozen=True)
class Share:
    """A source of a mixture."""

    name: str
    store: TokenStore
    weight: float = 1.0
    """Part of all sequences, relative to the other sources' weights."""


@dataclass(frozen=True)
class Loader:
    """Micro-batches of one rank."""

    sources: tuple[Share, ...]
    seq_len: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    rank: int
    world_size: int
    seed: int
    document_masking: bool = True

    def __post_init__(self) -> None:
        for source in self.sources:
            if num_windows(source.store, self.seq_len) < 1:
                raise DataError(
                    f"{source.name}: {len(source.store):,} training tokens do not fill one sequence of seq_len = "
                    f"{self.seq_len}: add text or lower train.batches.seq_len"
                )

    @cached_property
    def _schedule(self) -> Schedule:
        return Schedule([source.weight for source in self.sources])

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """All micro-batches of a step for this rank."""
        block, place = divmod(step, self._steps_per_block)
        sources, windows = self._block(block)
        return [
            cut([(self.sources[source].store, window) for source, window in pairs], self.seq_len, self.document_masking)
            for pairs in (zip(*row, strict=True) for row in zip(sources[place], windows[place], strict=True))
        ]

    @property
    def _steps_per_block(self) -> int:
        return -(-BLOCK // (self.gradient_accumulation_steps * self.micro_batch_size))

    def _block(self, number: int) -> tuple[Any, Any]:
        """Sources and windows of this rank in a run of steps, as nested lists (step, A, B); the last one is kept."""
        if number not in self._kept:
            first = number * self._steps_per_block
            drawn = self.windows(np.stack([self._samples(first + step) for step in range(self._steps_per_block)]))
            self._kept.clear()
            self._kept[number] = (drawn[0].tolist(), drawn[1].tolist())
        return self._kept[number]

    @cached_property
    def _kept(self) -> dict[int, tuple[Any, Any]]:
        return {}

    def _samples(self, step: int) -> NDArray[np.uint64]:
        """Global sample numbers of this rank, (A, B): the ranks lie side by side in each micro-batch."""
        accumulation, size = self.gradient_accumulation_steps, self.micro_batch_size
        passes = np.arange(step * accumulation, (step + 1) * accumulation)
        first = (passes * self.world_size + self.rank) * size
        return (first[:, None] + np.arange(size)).astype(np.uint64)

    def windows(self, samples: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and window number of global sample numbers, each of the shape of `samples`."""
        sources, numbers = self._schedule.draw(samples)
        windows = np.empty(samples.shape, np.int64)
        for source in np.unique(sources).tolist():
            count = num_windows(self.sources[source].store, self.seq_len)
            epochs = numbers // np.uint64(count)
            for epoch in np.unique(epochs[sources == source]).tolist():
                here = (sources == source) & (epochs == epoch)
                windows[here] = permute(numbers[here] % np.uint64(count), count, self.seed, source, epoch)
        return sources, windows


def epochs(sources: Sequence[Share], seq_len: int, num_sequences: int) -> dict[str, float]:
    """How often the first `num_sequences` samples have gone through each source."""
    counts = Schedule([source.weight for source in sources]).counts(num_sequences)
    return {
        source.name: count / num_windows(source.store, seq_len) for source, count in zip(sources, counts, strict=True)
    }


def num_windows(store: TokenStore, seq_len: int) -> int:
    """Sequences in one epoch of a store."""
    return (len(store) - 1) // seq_len


def cut(windows: Sequence[Window], seq_len: int, document_masking: bool) -> MicroBatch:
    """Windows of one or several streams, as a micro-batch of len(windows) sequences."""
    ids = np.empty((len(windows), seq_len + 1), np.int64)
    for row, (store, window) in enumerate(windows):
        ids[row] = store.tokens[window * seq_len : window * seq_len + seq_len + 1]
    answers = _answers(windows, seq_len)
    if not document_masking:
        return MicroBatch(ids, None, answers)
    starts = []  # in the rows laid one after another; a row is a start of its own
    for row, (store, window) in enumerate(windows):
        begin, here = window * seq_len, row * seq_len
        starts.append(here)
        starts += [start - begin + here for start in store.document_starts(begin + 1, begin + seq_len)]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(windows) * seq_len], strict=True)]
    positions = np.arange(len(windows) * seq_len)
    positions -= np.repeat(starts, lengths)
    return MicroBatch(ids, positions.reshape(len(windows), seq_len), answers)


def _answers(windows: Sequence[Window], seq_len: int) -> NDArray[np.bool_] | None:
    """Which targets of windows count; None when no store says so."""
    if all(store.answers is None for store, _ in windows):
        return None
    kept = np.ones((len(windows), seq_len), np.bool_)
    for row, (store, window) in enumerate(windows):
        if store.answers is not None:
            kept[row] = store.answers[window * seq_len + 1 : (window + 1) * seq_len + 1]
    return kept
