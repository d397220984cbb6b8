"""Frozen matrices in four bits (QLoRA, arXiv:2305.14314), unpacked one at a time where they are used.

Storage is NF4: blocks of 64 weights, each weight one of 16 levels times the largest magnitude of its block. The scales
are 8-bit numbers themselves, in blocks of 256 (double quantization): 4 + 8/64 + 32/(64 x 256) = 4.127 bits a weight. A
product unpacks the matrix, multiplies, and drops it; the backward pass, which needs the gradient of the input alone,
unpacks it again. So no more than one matrix is ever there in full.

The door to bitsandbytes, which packs and unpacks. Its layers are not used: they know nothing of fused experts, and what
it offers for plain parameters keeps peft from attaching adapters without a word.

Shape letters: N rows sorted by expert, E experts, D width in, O width out.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hpc.errors import ConfigError
from hpc.model.products import padded_product

BLOCK = 64
"""Weights that share a scale."""
SCALE_BLOCK = 256
"""Scales that share a scale."""


class FourBitMatrix:
    """A matrix (O, D) in NF4; without content until `reserve` and `pack` give it some."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.shape = (out_features, in_features)
        self._codes: Tensor | None = None
        self._scales: Tensor | None = None
        self._state: Any = None

    def reserve(self, device: str) -> None:
        """Get the memory for codes and scales. For all matrices before the first is packed: what stays would else lie
        between what packing needs for a moment, and a heap with such holes was seen to grow to twice its content."""
        weights = self.shape[0] * self.shape[1]
        self._codes = torch.empty(-(-weights // 2), 1, dtype=torch.uint8, device=device)
        self._scales = torch.empty(-(-weights // BLOCK), dtype=torch.uint8, device=device)

    def pack(self, weight_OD: Tensor) -> None:
        """Take a weight in full precision. The same weight gives the same bits."""
        functional = library()
        # Its kernel for CPUs scales rows wrongly whose width is no multiple of a block, and works on rows in parallel.
        blocks = weight_OD.reshape((-1, BLOCK) if weight_OD.numel() % BLOCK == 0 else -1)
        codes, state = functional.quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        state.code, state.state2.code = _levels(str(codes.device))  # tables that all matrices share
        assert self._codes is not None, "no memory was reserved"
        assert self._scales is not None
        self._codes.copy_(codes)
        state.absmax = self._scales.copy_(state.absmax)
        self._state = state

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The matrix in full."""
        assert self._codes is not None, "no weights were filled in"
        self._state.dtype = dtype
        weight: Tensor = library().dequantize_4bit(self._codes, self._state)
        return weight.view(self.shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held: codes, scales, scales of the scales and their mean."""
        assert self._codes is not None, "no weights were filled in"
        return self._codes, self._state.absmax, self._state.state2.absmax, self._state.offset

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors)


class FourBitExperts:
    """One matrix of each expert, (E, O, D), or several that lie on top of each other, such as gate and up."""

    def __init__(self, num_experts: int, out_features: int, in_features: int, roles: tuple[str, ...]) -> None:
        """roles: w1, w3, w2: the matrices that an expert's O rows consist of."""
        self.roles, self.shape = roles, (num_experts, out_features, in_features)
        rows = out_features // len(roles)
        self.matrices = [tuple(FourBitMatrix(rows, in_features) for _ in roles) for _ in range(num_experts)]


class FourBitLinear(nn.Module):
    """What stands in for a frozen linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.matrix = FourBitMatrix(linear.out_features, linear.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., O)"""
        y = _product(x.reshape(-1, self.in_features), self.matrix)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def grouped_four_bit(x_ND: Tensor, experts: FourBitExperts, counts_E: Tensor) -> Tensor:
    """A linear layer whose rows belong to different experts, (N, O), one expert's matrix in full at a time; rows past
    the sum of the counts give zeros."""
    counts = counts_E.tolist()
    parts = []
    for rows, matrices in zip(x_ND[: sum(counts)].split(counts), experts.matrices, strict=True):
        if len(rows):
            parts.append(torch.cat([_product(rows, matrix) for matrix in matrices], 1))
    return torch.cat([*parts, x_ND.new_zeros(x_ND.shape[0] - sum(counts), experts.shape[1])])


class _Product(torch.autograd.Function):
    """x @ weight.T. Nothing is kept for the backward pass but the packed weight, which is there anyway."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, matrix: FourBitMatrix) -> Tensor:
        ctx.matrix = matrix
        return padded_product(x_ND, matrix.unpack(x_ND.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient_NO = gradients[0].contiguous()
        return padded_product(gradient_NO, ctx.matrix.unpack(gradient_NO.dtype).T), None


_product: Callable[[Tensor, FourBitMatrix], Tensor] = _Product.apply


@cache
def library() -> Any:
    """bitsandbytes' functions. Raises ConfigError, with the way to get it, where it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ConfigError(
            f"train.base_bits = 4 needs bitsandbytes, which cannot be imported ({error}): pip install "
            "'greenmoe[qlora]', or leave base_bits out"
        ) from None
    return functional


@cache
def _levels(device: str) -> tuple[Tensor, Tensor]:
    """The 16 levels of NF4, and the 256 of its scales."""
    functional = library()
    return functional.get_4bit_type("nf4", device=device), functional.create_dynamic_map().to(device)
