"""The router passport of a calibration: how many of its tokens each expert sees, and which see too few.

Shape letters: N windows, S tokens of one, L MoE layers, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpc.model.routing import RouterProbe
from hpc.shrink.calibration import Ids

TOKENS_AT_A_TIME = 8192
"""Of one forward pass. A streamed model is read from disk once for each."""


@dataclass(frozen=True)
class Passport:
    """Calibration tokens by layer and expert."""

    counts: tuple[tuple[int, ...], ...]
    """(L, E)."""
    minimum: int
    """What every expert was to see."""

    @property
    def fewest(self) -> int | None:
        """Tokens of the expert that saw fewest; None for a dense model."""
        return min((count for layer in self.counts for count in layer), default=None)

    @property
    def short(self) -> list[tuple[int, int, int]]:
        """(layer, expert, tokens) of those below the minimum; MoE layers counted from 0."""
        return [
            (layer, expert, count)
            for layer, counts in enumerate(self.counts)
            for expert, count in enumerate(counts)
            if count < self.minimum
        ]


def passport(model: nn.Module, ids: Ids, minimum: int) -> Passport:
    """Count what the routers of a transformers model without its head choose for ids (N, S)."""
    probe = RouterProbe(model)
    total: torch.Tensor | None = None
    with torch.no_grad():
        for part in batches(ids):
            model(input_ids=part, use_cache=False)
            counts_LE = probe.collect().counts_LE
            total = counts_LE if total is None else total + counts_LE
    assert total is not None
    return Passport(tuple(tuple(round(count) for count in layer) for layer in total.tolist()), minimum)


def covered(
    draw: Callable[[int], Ids], look: Callable[[Ids], Passport], tokens: int, most: int
) -> tuple[Ids, Passport]:
    """Calibration text that is doubled, up to `most` tokens, while an expert sees too little of it.

    draw: text of about so many tokens. Stops early when there is no more of it.
    """
    ids = draw(tokens)
    found = look(ids)
    while found.short and tokens < most:
        tokens = min(2 * tokens, most)
        more = draw(tokens)
        if more.size <= ids.size:
            break
        ids, found = more, look(more)
    return ids, found


def batches(ids: Ids) -> list[torch.Tensor]:
    """Ids (N, S) in parts of at most TOKENS_AT_A_TIME, one window at least."""
    size = max(1, TOKENS_AT_A_TIME // ids.shape[1])
    return [torch.from_numpy(ids[start : start + size]) for start in range(0, len(ids), size)]


def census(found: Passport, layers: list[int]) -> dict[str, Any]:
    """For a receipt. layers: numbers of the MoE layers among all decoder layers."""
    return {
        "assignments": [list(layer) for layer in found.counts],
        "min_expert_tokens": found.minimum,
        "short": [{"layer": layers[layer], "expert": expert, "tokens": count} for layer, expert, count in found.short],
    }
