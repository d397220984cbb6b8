"""Stand-ins, in torch and on the CPU, for what MegaBlocks and grouped_gemm compile with nvcc. Everything else is real.

`install` puts this module in the place of their two compiled modules; their Triton kernels run in Triton's interpreter.
Each function asserts what the CUDA function it stands for checks or silently relies on (csrc/*.h of megablocks 0.10.0,
csrc/grouped_gemm.cu of grouped_gemm 0.3.0), so that code which the GPU would refuse fails here too.

What the tests on top of it prove: the layout of the weights, the permutation of the tokens (MegaBlocks' Triton kernels,
forward and backward), the autograd of the grouped GEMM (which operand is transposed where), the arguments it is called
with, expert parallelism. What they don't prove: the CUDA kernels themselves, bf16 numerics, speed. For these there is
a test marked `gpu` (tests/model/test_megablocks.py).
"""

import sys
from typing import Any

import torch
import triton
from torch import Tensor

INTEGERS = (torch.int16, torch.int32, torch.int64)
calls = 0
"""Grouped GEMMs computed so far: a test sees that its numbers came from here."""


def install() -> None:
    """Take the place of the compiled modules. Must come before the first import of megablocks."""
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 is not set"
    sys.modules["megablocks_ops"] = sys.modules["grouped_gemm_backend"] = sys.modules[__name__]
    triton.autotune = lambda configs, key, **_: lambda kernel: _Tuned(kernel, configs[-1])


class _Tuned:
    """A kernel with one of its configurations: there is nothing to measure in an interpreter."""

    def __init__(self, kernel: Any, config: Any) -> None:
        self.kernel, self.config = kernel, config

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **named: self.kernel[grid](*arguments, **named, **self.config.kwargs)


def histogram(x: Tensor, num_bins: int) -> Tensor:
    """How many values of x (N,) are 0, 1, ... num_bins - 1, as int32."""
    assert x.dtype in INTEGERS
    assert x.dim() == 1
    assert x.is_contiguous()
    return torch.bincount(x, minlength=num_bins)[:num_bins].int()


def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
    """A stable sort of x (N,) by its lowest bits; iota_out tells where each value came from."""
    assert x.dtype in INTEGERS
    assert x.dtype == x_out.dtype == iota_out.dtype
    assert x.dim() == x_out.dim() == iota_out.dim() == 1
    assert x.is_contiguous()
    values, order = torch.sort(x & (2**end_bit - 1), stable=True)
    x_out.copy_(values)
    iota_out.copy_(order)


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Running sums along the rows of x (B, N)."""
    assert x.dtype in INTEGERS
    assert x.dtype == out.dtype
    assert x.dim() == out.dim() == 2
    assert dim == 1
    assert x.is_contiguous()
    out.copy_(x.cumsum(1))


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    """out[b, i] = x[b, j] for the bin j that holds i; bins (N,) are inclusive ends."""
    assert x.dtype in (torch.float16, torch.int16, torch.int32)
    assert x.dtype == out.dtype
    assert bins.dtype == torch.int32
    assert x.shape == (out.shape[0], bins.shape[0])
    counts = bins.diff(prepend=bins.new_zeros(1))
    out.copy_(x.repeat_interleave(counts, dim=1))


def gmm(a: Tensor, b: Tensor, c: Tensor, batch_sizes: Tensor, trans_a: bool, trans_b: bool) -> None:
    """c = one matrix product for each expert, in the three forms that forward and backward need.

    trans_a: a (N, D), b (N, O) -> c (E, D, O); trans_b: a (N, D), b (E, O, D) -> c (N, O); else b (E, D, O).
    """
    global calls
    calls += 1
    assert batch_sizes.device.type == "cpu"
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.dim() == 1
    assert int(batch_sizes.sum()) == a.shape[0] > 0  # cuBLAS reads past the end, CUTLASS refuses no work
    assert a.dtype == b.dtype == c.dtype
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert c.is_contiguous()
    assert not (trans_a and trans_b)
    rows = a.split(batch_sizes.tolist())
    if trans_a:
        assert b.shape[0] == a.shape[0]
        assert c.shape == (batch_sizes.shape[0], a.shape[1], b.shape[1])
        torch.stack([x.T @ y for x, y in zip(rows, b.split(batch_sizes.tolist()), strict=True)], out=c)
        return
    assert b.shape[0] == batch_sizes.shape[0]
    assert a.shape[1] == (b.shape[2] if trans_b else b.shape[1])
    assert c.shape == (a.shape[0], b.shape[1] if trans_b else b.shape[2])
    torch.cat([x @ (weight.T if trans_b else weight) for x, weight in zip(rows, b, strict=True)], out=c)
