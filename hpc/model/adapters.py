"""Low-rank adapters on experts (LoRA, arXiv:2106.09685), for fused experts and for expert-parallel ones.

    y[n] = (W[e] + alpha / r * B[e] A[e]) x[n]        computed as W[e] x + alpha / r * B[e] (A[e] x)

Both products are torch's own also where oneDNN is the faster one (hpc/model/products.py): they are small, and a kernel
compiled for each number of rows costs more time and memory than it saves (a third of the speed and half of the memory
of the quickstart's adapters). No matrix of the experts' size is made, neither forward nor backward. The adapters are
modules of their own beside the MoE block of a layer: DeepSpeed may replace the block, and ZeRO 3 gathers what a module
needs when it is called.

Shape letters: N rows sorted by expert, E experts, R rank, D input and O output width, H hidden, I intermediate.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

PLACE = "adapter"
"""Name of the adapters in a decoder layer: model.layers.3.adapter.experts.gate_up.A"""


class LowRank(nn.Module):
    """One adapted matrix of all experts."""

    def __init__(self, first_A_ERD: Tensor, out_features: int, scale: float, adapted_E: Tensor | None) -> None:
        """first_A_ERD: initial A of the experts that this rank holds; adapted_E: 1 for experts that learn, else 0."""
        super().__init__()
        self.A = nn.Parameter(first_A_ERD)
        self.B = nn.Parameter(first_A_ERD.new_zeros(first_A_ERD.shape[0], out_features, first_A_ERD.shape[1]))
        self.scale = scale
        self.adapted = None if adapted_E is None or bool(adapted_E.all()) else adapted_E.tolist()

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """What is added to the product of rows sorted by expert; rows past the sum of the counts give zeros."""
        counts = counts_E.tolist()
        parts = []
        for expert, rows in enumerate(x_ND[: sum(counts)].split(counts)):
            y = linear(linear(rows, self.A[expert]), self.B[expert]) * self.scale
            parts.append(y if self.adapted is None or self.adapted[expert] else y * 0.0)
        parts.append(x_ND.new_zeros(x_ND.shape[0] - sum(counts), self.B.shape[1]))
        return torch.cat(parts)

    def delta(self, A_ERD: Tensor, B_EOR: Tensor) -> Tensor:
        """What merging adds to the experts' matrices, (E, O, D), from whole A and B."""
        added = torch.bmm(B_EOR, A_ERD) * self.scale
        if self.adapted is not None:
            added *= torch.tensor(self.adapted, dtype=added.dtype, device=added.device).view(-1, 1, 1)
        return added


class ExpertAdapters(nn.Module):
    """The adapters of one MoE block."""

    def __init__(self, gate_up: LowRank, down: LowRank) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down


class Beside(nn.Module):
    """Holds a block's adapters under `experts`, so that their names tell that experts are split over ranks."""

    def __init__(self, experts: ExpertAdapters) -> None:
        super().__init__()
        self.experts = experts


def first_A(num_experts: int, rank: int, width: int, seed: int) -> Tensor:
    """Initial A of all experts (E, R, D), as peft initialises a linear layer: uniform within 1 / sqrt(D)."""
    bound = 1 / math.sqrt(width)
    random = torch.Generator().manual_seed(seed)
    return torch.empty(num_experts, rank, width).uniform_(-bound, bound, generator=random)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertAdapters]]:
    """(name, decoder layer, adapters) of every layer whose experts are adapted, in order."""
    for name, module in model.named_modules():
        beside = getattr(module, PLACE, None)
        if isinstance(beside, Beside):
            yield name, module, beside.experts
