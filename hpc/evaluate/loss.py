"""Held-out loss: the same windows and the same arithmetic during training and for every finished model.

Shape letters: B sequences, S seq_len, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hpc.data.loader import IGNORED, cut, num_windows
from hpc.data.store import TokenStore
from hpc.errors import DataError


def held_out_loss(
    forward: Callable[[Tensor, Tensor | None], Tensor],
    stores: Sequence[TokenStore],
    *,
    seq_len: int,
    batch_size: int,
    document_masking: bool = True,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, int]:
    """Mean negative log-likelihood (nats per token) and the number of tokens it was taken over.

    forward maps ids (B, S) and positions (B, S), None without document masking, to logits (B, S, V). The streams are
    cut into windows of S inputs and S targets that do not overlap; `max_tokens` of them (all when None) are taken
    evenly from all over the streams. Ranks share the windows; every rank makes the same number of passes, with weight 0
    where it has none left, so that expert-parallel exchanges match. Collective then.
    """
    pool = [(store, window) for store in stores for window in range(num_windows(store, seq_len))]
    if not pool:
        held = sum(map(len, stores))
        raise DataError(f"{held:,} held-out tokens do not fill one sequence of {seq_len}: add text to hold out")
    windows = len(pool) if max_tokens is None else min(len(pool), max(1, max_tokens // seq_len))
    spread = np.arange(windows) * len(pool) // windows
    passes = math.ceil(windows / (batch_size * world_size))
    total, count = 0.0, 0
    with torch.no_grad():
        for number in range(passes):
            first = (number * world_size + rank) * batch_size
            wanted = np.arange(first, first + batch_size)
            chosen = spread[np.minimum(wanted, windows - 1)]
            batch = cut([pool[at] for at in chosen], seq_len, document_masking)
            ids = torch.from_numpy(batch.ids)
            positions = None if batch.positions is None else torch.from_numpy(batch.positions)
            targets = torch.from_numpy(batch.targets)
            loss = token_losses(forward(ids[:, :-1], positions), targets)
            real = int((wanted < windows).sum())
            total += float(loss[:real].double().sum())
            count += int((targets[:real] != IGNORED).sum())
            if progress:
                progress(number + 1, passes)
    if dist.is_initialized() and world_size > 1:
        sums = torch.tensor([total, float(count)], dtype=torch.float64)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        sums = sums.to(device)
        dist.all_reduce(sums)
        total, count = float(sums[0]), int(sums[1])
    if not count:
        raise DataError(f"{windows} held-out sequences hold no answer: hold out more, or lower seq_len")
    return total / count, count


def by_document(logits: Callable[[list[int]], Any]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A `forward` for `held_out_loss` from a function that knows nothing of batches and packed documents.

    logits: ids of one text -> (S, V) array. Each window is cut where positions begin again, so that no document sees
    another; a piece is computed by itself, from an empty cache.
    """

    def forward(ids: Tensor, positions: Tensor | None) -> Tensor:
        rows = []
        for row, text in enumerate(ids.tolist()):
            starts = (
                [0]
                if positions is None
                else [at for at, place in enumerate(positions[row].tolist()) if not place or not at]
            )
            pieces = [text[first:last] for first, last in zip(starts, [*starts[1:], len(text)], strict=True)]
            rows.append(torch.cat([torch.from_numpy(logits(piece)) for piece in pieces]))
        return torch.stack(rows)

    return forward


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (nats) of each target: logits (B, S, V) and targets (B, S) -> (B, S), in fp32; 0 where a
    target is IGNORED."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.to(logits.device).flatten(), reduction="none")
    return flat.view(targets.shape)
