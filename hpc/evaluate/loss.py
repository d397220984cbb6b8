"""Held-out loss: the same windows and the same arithmetic during training and for every finished model.

Shape letters: B sequences, S seq_len, V vocabulary.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hpc.data.loader import cut
from hpc.data.store import TokenStore
from hpc.errors import DataError


def held_out_loss(
    forward: Callable[[Tensor], Tensor],
    store: TokenStore,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, int]:
    """Mean negative log-likelihood (nats per token) and the number of tokens it was taken over.

    forward maps ids (B, S) to logits (B, S, V). The stream is cut into windows of S inputs and S targets that do not
    overlap; the first `max_tokens` are used (all when None). Ranks share the windows; every rank makes the same number
    of passes, with weight 0 where it has none left, so that expert-parallel exchanges match. Collective then.
    """
    windows = (len(store) - 1) // seq_len
    if windows < 1:
        raise DataError(f"{len(store):,} held-out tokens do not fill one sequence of {seq_len}: add text to hold out")
    if max_tokens is not None:
        windows = min(windows, max(1, max_tokens // seq_len))
    passes = math.ceil(windows / (batch_size * world_size))
    total, count = 0.0, 0
    with torch.no_grad():
        for number in range(passes):
            first = (number * world_size + rank) * batch_size
            wanted = np.arange(first, first + batch_size)
            batch = torch.from_numpy(cut(store, np.minimum(wanted, windows - 1), seq_len))
            loss = token_losses(forward(batch[:, :-1]), batch[:, 1:])
            real = int((wanted < windows).sum())
            total += float(loss[:real].double().sum())
            count += real * seq_len
            if progress:
                progress(number + 1, passes)
    if dist.is_initialized() and world_size > 1:
        sums = torch.tensor([total, float(count)], dtype=torch.float64)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        sums = sums.to(device)
        dist.all_reduce(sums)
        total, count = float(sums[0]), int(sums[1])
    return total / count, count


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (nats) of each target: logits (B, S, V) and targets (B, S) -> (B, S), in fp32."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.to(logits.device).flatten(), reduction="none")
    return flat.view(targets.shape)
