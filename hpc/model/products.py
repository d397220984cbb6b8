"""Matrix products in fp32 on CPUs, through oneDNN.

PyTorch gives `torch.mm` to MKL, which on processors of another maker than Intel keeps to AVX2. oneDNN, which PyTorch
carries as well, generates AVX-512 code on all of them: 115 and 260 GFLOP/s a core on an AMD EPYC 9005 (measured
2026-11-24, `bench train`). PyTorch lets compiled inference have it, not training: hence the gradient here.

oneDNN compiles a kernel for every new shape (0.3 ms) and keeps the last 1,024: `padded` keeps the row counts few.

Shape letters: N rows, D width in, O width out.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's product is the faster one: fp32 on a CPU with AVX-512. No other was measured."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def product(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x_ND @ weight_OD.T + bias_O, without a gradient of its own. Rows of x that are not contiguous are copied."""
    if serves(x_ND.device, x_ND.dtype):
        if not (weight_OD.is_contiguous() or weight_OD.T.is_contiguous()):
            weight_OD = weight_OD.contiguous()  # for other strides oneDNN has but a loop, a hundred times slower
        y_NO: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_ND, weight_OD, bias_O, "none", [], "")
        return y_NO
    return torch.nn.functional.linear(x_ND, weight_OD, bias_O)


def weight_gradient(gradient_NO: Tensor, x_ND: Tensor) -> Tensor:
    """gradient_NO.T @ x_ND, in any strides. oneDNN copies the left factor into rows: the narrower one goes there."""
    if gradient_NO.shape[1] > 2 * x_ND.shape[1]:
        return product(x_ND.T, gradient_NO.T).T
    return product(gradient_NO.T, x_ND.T)


def padded(rows: int) -> int:
    """The next of at most 32 row counts between a power of two and its double: 3 % more rows at worst."""
    grain = 1 << max(0, rows.bit_length() - 6)
    return -(-rows // grain) * grain


def padded_product(x_ND: Tensor, weight_OD: Tensor) -> Tensor:
    """`product` of a number of rows that changes from call to call, with zeros up to the next of few numbers."""
    rows = len(x_ND)
    return product(torch.nn.functional.pad(x_ND, (0, 0, 0, padded(rows) - rows)), weight_OD)[:rows]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_OD: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_OD)
        return product(x_ND, weight_OD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_ND, weight_OD = ctx.saved_tensors
        wanted_x, wanted_weight = ctx.needs_input_grad
        gradient_NO = gradients[0].contiguous()
        return (
            product(gradient_NO, weight_OD.T) if wanted_x else None,
            weight_gradient(gradient_NO, x_ND).contiguous() if wanted_weight else None,
        )


_linear: Callable[..., Tensor] = _Linear.apply


def linear(x: Tensor, weight_OD: Tensor) -> Tensor:
    """x (..., D) -> (..., O), with gradients of both."""
    return _linear(x.reshape(-1, x.shape[-1]), weight_OD).view(*x.shape[:-1], -1)


def use_products(model: nn.Module) -> None:
    """Let the linear layers of a model compute here, those for which this is the faster way. Idempotent."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None and serves(module.weight.device, module.weight.dtype):
            module.forward = MethodType(_forward, module)


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, self.weight)
