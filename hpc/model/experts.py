"""Expert compute behind one protocol: a linear layer whose rows belong to different experts.

    y[n] = x[n] @ weight[e(n)].T        rows sorted by expert, counts[e] rows for expert e

Everything around it (dispatch, SwiGLU, combination) is the same for every backend, and every backend serves both
transformers' fused experts and DeepSpeed's expert-parallel layer.

Shape letters: T tokens, K experts per token, N = T*K rows sorted by expert, E experts, H hidden, I intermediate,
O and D output and input width of one linear layer.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpc.errors import ConfigError
from hpc.model.adapters import ExpertAdapters, LowRank, adapted_layers
from hpc.model.experts_cpu import on_cpu, sorted_on_cpu
from hpc.model.four_bit import FourBitExperts, grouped_four_bit
from hpc.model.megablocks import grouped_gemm, megablocks
from hpc.model.products import serves

GroupedLinear = Callable[[Tensor, Any, Tensor], Tensor]
"""(x_ND, weight_EOD, counts_E) -> y_NO; the weight is a tensor, or FourBitExperts for `grouped_four_bit`. Rows past the
sum of the counts are padding: what they hold is undefined."""


def grouped_mm(x_ND: Tensor, weight_EOD: Tensor, counts_E: Tensor) -> Tensor:
    """torch's grouped matrix product: one kernel for all experts, forward and backward. On CPUs, where torch has none
    and loops over the experts, a layer in fp32 is computed by `hpc.model.experts_cpu`, expert by expert in cache."""
    offsets_E = counts_E.cumsum(0, dtype=torch.int32)
    return functional.grouped_mm(x_ND, weight_EOD.transpose(-2, -1), offs=offsets_E)


def loop(x_ND: Tensor, weight_EOD: Tensor, counts_E: Tensor) -> Tensor:
    """One product per expert: the reference. Experts without rows stay in the graph and get a zero gradient."""
    counts = counts_E.tolist()
    parts = [rows @ weight.T for rows, weight in zip(x_ND[: sum(counts)].split(counts), weight_EOD, strict=True)]
    padding = x_ND.new_zeros(x_ND.shape[0] - sum(counts), weight_EOD.shape[1])
    return torch.cat([*parts, padding])


BACKENDS: dict[str, GroupedLinear] = {"grouped_mm": grouped_mm, "loop": loop, "megablocks": megablocks}


def check_available(backend: str, device: str, precision: str) -> None:
    """Raise ConfigError when a backend cannot run here, with the way to get it."""
    if backend == "megablocks":
        if device != "cuda":
            raise ConfigError("train.expert_compute = megablocks needs an NVIDIA GPU: take grouped_mm")
        if precision != "bf16":
            raise ConfigError(
                f"train.precision = {precision}, expert_compute = megablocks computes bf16 only: set bf16"
            )
        grouped_gemm()


class _Reorder(torch.autograd.Function):
    """Rows in another order. The gradient of a permutation is its inverse: gathered, never accumulated."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x_ND.index_select(0, order_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse_N), None, None


class _Dispatch(torch.autograd.Function):
    """Every token once for each of its experts, sorted by expert. The gradient is a gather and a sum over K."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, order_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.top_k = top_k
        return x_TH.index_select(0, order_N // top_k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_N,) = ctx.saved_tensors
        gradient = gradients[0].index_select(0, inverse_N)
        return gradient.view(-1, ctx.top_k, gradient.shape[-1]).sum(1), None, None, None


_dispatch: Callable[..., Tensor] = _Dispatch.apply
_reorder: Callable[..., Tensor] = _Reorder.apply


def swiglu_experts(
    linear: GroupedLinear,
    x_TH: Tensor,
    chosen_TK: Tensor,
    weights_TK: Tensor,
    gate_up: Tensor | FourBitExperts,
    down: Tensor | FourBitExperts,
    adapters: ExpertAdapters | None = None,
) -> Tensor:
    """Output (T, H) of a layer of SwiGLU experts. gate_up (E, 2I, H) holds the gate first; down is (E, H, I)."""
    if adapters is None and linear is grouped_mm and serves(x_TH.device, x_TH.dtype):
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        return on_cpu(x_TH, chosen_TK, weights_TK, (gate_up,), down)
    top_k = chosen_TK.shape[-1]
    order_N = chosen_TK.flatten().argsort(stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    counts_E = torch.bincount(chosen_TK.flatten(), minlength=gate_up.shape[0])
    x_NH = _dispatch(x_TH, order_N, inverse_N, top_k)
    gate_NI, up_NI = _adapted(linear, x_NH, gate_up, counts_E, adapters.gate_up if adapters else None).chunk(2, -1)
    y_NH = _adapted(linear, functional.silu(gate_NI) * up_NI, down, counts_E, adapters.down if adapters else None)
    y_TKH = _reorder(y_NH, inverse_N, order_N).view(*chosen_TK.shape, -1)
    return (y_TKH * weights_TK.unsqueeze(-1).to(y_TKH.dtype)).sum(1)


def _adapted(linear: GroupedLinear, x_ND: Tensor, weight: Any, counts_E: Tensor, adapter: LowRank | None) -> Tensor:
    """A grouped product, and what its adapter adds."""
    y_NO = linear(x_ND, weight, counts_E)
    return y_NO if adapter is None else y_NO + adapter(x_ND, counts_E)


def use_backend(model: nn.Module, backend: str) -> None:
    """Let all experts of a model compute with a backend: transformers' fused layers and DeepSpeed's local ones.

    Call it after DeepSpeed has put its layers in place. Idempotent; a dense model is left as it is.
    """
    adapted = {id(module): adapters for _, layer, adapters in adapted_layers(model) for module in layer.modules()}
    for module in model.modules():
        adapters = adapted.get(id(module))
        is_packed = any(isinstance(held, FourBitExperts) for held in vars(module).values())
        linear = grouped_four_bit if is_packed else BACKENDS[backend]
        if type(module).__name__ == "GroupedExperts":
            module.forward = MethodType(expert_parallel_forward(linear, adapters), module)
        elif hasattr(module, "_is_expert_parallel"):  # set by transformers' decorator of fused experts
            module.forward = MethodType(transformers_forward(linear, adapters), module)


def transformers_forward(linear: GroupedLinear, adapters: ExpertAdapters | None = None) -> Callable[..., Tensor]:
    """What transformers calls in place of its own experts' forward."""

    def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate_up: Any = self.gate_up_proj
        down: Any = self.down_proj
        return swiglu_experts(linear, hidden_states, top_k_index, top_k_weights, gate_up, down, adapters)

    return forward


def expert_parallel_forward(linear: GroupedLinear, adapters: ExpertAdapters | None = None) -> Callable[..., Tensor]:
    """What replaces the forward of DeepSpeed's local experts: w1 (E, I, H) gate, w3 up, w2 (E, H, I) down."""

    def forward(self: nn.Module, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        gate: Any = self.w1
        up: Any = self.w3
        down: Any = self.w2
        counts_E = num_tokens_per_expert
        if adapters is not None:
            added_gate, added_up = adapters.gate_up(x, counts_E).chunk(2, -1)
            h_NI = functional.silu(linear(x, gate, counts_E) + added_gate) * (linear(x, up, counts_E) + added_up)
            return _adapted(linear, h_NI, down, counts_E, adapters.down)
        if linear is grouped_mm and serves(x.device, x.dtype):
            return sorted_on_cpu(x, counts_E, (gate, up), down)
        h_NI = functional.silu(linear(x, gate, counts_E)) * linear(x, up, counts_E)
        return linear(h_NI, down, counts_E)

    return forward
