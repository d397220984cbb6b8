"""Which tokens a rank sees at a step: a pure function of (seed, step, rank, world), so a position is one number.

The token stream is cut into windows of seq_len + 1 tokens that overlap by one (inputs and targets); they cross document
boundaries, which an end-of-text token marks. Each epoch visits every window once, in an order given by a keyed
permutation (a four-round Feistel network with cycle walking), so no index file is needed and a seek is free. The order
over the whole job does not depend on the number of ranks.

Shape letters: B sequences of a micro-batch, S seq_len.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc.data.store import TokenStore
from hpc.errors import DataError

ROUNDS = 4


@dataclass(frozen=True)
class Loader:
    """Micro-batches of one rank."""

    store: TokenStore
    seq_len: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    rank: int
    world_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise DataError(
                f"{len(self.store):,} training tokens do not fill one sequence of seq_len = {self.seq_len}: "
                "add text or lower train.batches.seq_len"
            )

    @property
    def num_windows(self) -> int:
        """Sequences in one epoch."""
        return (len(self.store) - 1) // self.seq_len

    def micro_batches(self, step: int) -> list[NDArray[np.int64]]:
        """All micro-batches of a step for this rank, each (B, S + 1)."""
        sequences_per_step = self.world_size * self.micro_batch_size * self.gradient_accumulation_steps
        batches = []
        for accumulation in range(self.gradient_accumulation_steps):
            first = step * sequences_per_step
            first += (accumulation * self.world_size + self.rank) * self.micro_batch_size
            windows = self.windows(np.arange(first, first + self.micro_batch_size, dtype=np.uint64))
            batches.append(cut(self.store, windows, self.seq_len))
        return batches

    def windows(self, samples: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Window numbers of global sample numbers (any shape)."""
        count = np.uint64(self.num_windows)
        epochs, positions = samples // count, samples % count
        return np.array(
            [permute(int(position), self.num_windows, self.seed + 1_000_003 * int(epoch))
             for epoch, position in zip(epochs.ravel(), positions.ravel(), strict=True)], np.int64,
        ).reshape(samples.shape)  # fmt: skip


def cut(store: TokenStore, windows: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Windows of the stream, (B,) -> (B, S + 1)."""
    offsets = windows[:, None] * seq_len + np.arange(seq_len + 1)[None, :]
    return np.asarray(store.tokens[offsets], np.int64)


def permute(position: int, count: int, key: int) -> int:
    """The place of `position` in a keyed permutation of range(count).

    A balanced Feistel network (Luby and Rackoff 1988) on the next even number of bits; values outside the range are
    put through again until they fall inside, which keeps it a permutation.
    """
    half = max(1, (max(1, count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (_mix(right, key, number) & mask)
        position = (left << half) | right
        if position < count:
            return position


def _mix(value: int, key: int, number: int) -> int:
    """SplitMix64's finalizer over value, key and round number (Steele et al. 2014)."""
    state = (value * 0x9E3779B97F4A7C15 + key * 0xD1342543DE82EF95 + number * 0xA0761D6478BD642F) & (2**64 - 1)
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return state ^ (state >> 31)
