"""Our expert layer against the dense limit: the same floating-point operations as plain matrix products.

Shape letters: T tokens, K experts per token, N = T*K rows, E experts, H hidden, I intermediate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from hpc.bench.turns import CLOCKS, Clock
from hpc.model.experts import BACKENDS, swiglu_experts

T, H, I, K = 4096, 512, 1024, 2  # noqa: E741
FLOPS = 3 * 2 * T * K * 3 * H * I
"""Forward and backward of the layer's matrix products: forward, gradient of the input, gradient of the weights."""


@dataclass(frozen=True)
class Layer:
    """Seconds of forward and backward, medians of rounds in which all took turns."""

    torch_mm: float
    """The six dense products through `torch.mm`, which is what a dense layer of PyTorch costs."""
    fastest: float
    """Each product through the fastest kernel that torch has for it here: the limit."""
    experts: dict[int, float]
    """Our layer, by number of experts."""

    @property
    def limit_flops(self) -> float:
        """FLOP/s of the limit."""
        return FLOPS / self.fastest


def measure(rounds: int, experts: tuple[int, ...], clock: Clock) -> Layer:
    """Time the limit and the layer in turns, on the threads that torch has."""
    layers = {number: _layer(number) for number in experts}
    products = _products()
    seconds: dict[int, list[float]] = {number: [] for number in experts}
    plain: list[float] = []
    fastest: list[float] = []

    def timed(action: Callable[[], object]) -> float:
        began = CLOCKS[clock]()
        action()
        return CLOCKS[clock]() - began

    for number in range(rounds + 1):
        mm = [timed(kernels[0]) for kernels in products]
        others = [min(map(timed, kernels[1:]), default=first) for first, kernels in zip(mm, products, strict=True)]
        measured = {experts_here: timed(layer) for experts_here, layer in layers.items()}
        if number == 0:
            continue  # warm-up: kernels are generated, memory is touched
        plain.append(sum(mm))
        fastest.append(sum(map(min, mm, others)))
        for experts_here, value in measured.items():
            seconds[experts_here].append(value)
    return Layer(median(plain), median(fastest), {number: median(values) for number, values in seconds.items()})


def _products() -> list[list[Callable[[], object]]]:
    """The six products of a dense SwiGLU layer with N rows; for each, the kernels that compute it."""
    torch.manual_seed(0)
    x_NH, h_NI, g_NG = torch.randn(T * K, H), torch.randn(T * K, I), torch.randn(T * K, 2 * I)
    up_GH, down_HI = torch.randn(2 * I, H), torch.randn(H, I)
    pairs = [(x_NH, up_GH.t()), (h_NI, down_HI.t()), (g_NG, up_GH), (x_NH, down_HI), (g_NG.t(), x_NH),
             (x_NH.t(), h_NI)]  # fmt: skip
    return [_kernels(left, right) for left, right in pairs]


def _kernels(left: Tensor, right: Tensor) -> list[Callable[[], object]]:
    out = torch.empty(left.shape[0], right.shape[1])
    kernels: list[Callable[[], object]] = [lambda: torch.mm(left, right, out=out)]
    if torch.backends.mkldnn.is_available():
        kernels.append(lambda: torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], ""))
    return kernels


def _layer(experts: int) -> Callable[[], object]:
    torch.manual_seed(experts)
    x_TH = torch.randn(T, H, requires_grad=True)
    gate_up = (0.02 * torch.randn(experts, 2 * I, H)).requires_grad_()
    down = (0.02 * torch.randn(experts, H, I)).requires_grad_()
    weights_TK, chosen_TK = torch.randn(T, experts).softmax(-1).topk(K, -1)
    weights_TK = weights_TK.clone().requires_grad_()
    gradient_TH = torch.randn(T, H)

    def forward_backward() -> None:
        for leaf in (x_TH, gate_up, down, weights_TK):
            leaf.grad = None
        swiglu_experts(BACKENDS["grouped_mm"], x_TH, chosen_TK, weights_TK, gate_up, down).backward(gradient_TH)

    return forward_backward
