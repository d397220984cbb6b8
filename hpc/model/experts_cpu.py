"""A layer of SwiGLU experts on a CPU: expert by expert, from the gather of its tokens to the sum of its outputs.

The rows of one expert fit in the cache; those of all do not. So an expert's rows are gathered, multiplied, gated,
weighted and added to the output before the next expert is begun, and in the backward pass again. Kept for that pass:
the input, the products before the gate and the outputs; the gated rows are computed again, which is cheaper than
reading them from memory.

Shape letters: T tokens, K experts per token, E experts, S slots (rows sorted by expert, each expert's padded, see
`products.padded`), R slots of one expert, H hidden, I intermediate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hpc.model.products import padded, product


@dataclass(frozen=True)
class _Slots:
    """Which token each slot holds. Padding holds token 0 with weight 0."""

    tokens_S: Tensor
    place_N: Tensor
    """Slot of each (token, choice), in order of expert."""
    order_N: Tensor
    """The flat (token, choice) at each place of that order."""
    parts: list[slice]
    """Slots of each expert."""

    @classmethod
    def sort(cls, chosen_N: Tensor, top_k: int, num_experts: int) -> "_Slots":
        counts_E = torch.bincount(chosen_N, minlength=num_experts)
        counts = counts_E.tolist()
        sizes = [padded(count) for count in counts]
        starts = torch.tensor([0, *sizes]).cumsum(0)
        order_N = chosen_N.argsort(stable=True)
        shift_E = starts[:-1] - (counts_E.cumsum(0) - counts_E)
        place_N = torch.arange(len(order_N)) + shift_E.repeat_interleave(counts_E)
        tokens_S = torch.zeros(int(starts[-1]), dtype=torch.int64)
        tokens_S[place_N] = order_N // top_k
        edges = starts.tolist()
        return cls(tokens_S, place_N, order_N, [slice(a, b) for a, b in pairwise(edges)])


class _Experts(torch.autograd.Function):
    """(x_TH, weights_N, slots, down_EHI, *ups) -> (T, H), with ups = gate_up (E, 2I, H), or gate and up (E, I, H)."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weights_N: Tensor, slots: _Slots, down: Tensor, *ups: Tensor) -> Tensor:
        weights_S1 = x_TH.new_zeros(len(slots.tokens_S), 1)
        weights_S1[slots.place_N, 0] = weights_N[slots.order_N]
        inner = down.shape[2]
        kept: list[Tensor] = []
        out_TH = torch.zeros_like(x_TH)
        for expert, part in enumerate(slots.parts):
            tokens_R = slots.tokens_S[part]
            if not len(tokens_R):
                kept += [tokens_R, tokens_R]
                continue
            x_RH = x_TH.index_select(0, tokens_R)
            gate_up = _side_by_side([product(x_RH, up[expert]) for up in ups])
            y_RH = product(functional.silu(gate_up[:, :inner]).mul_(gate_up[:, inner:]), down[expert])
            out_TH.index_add_(0, tokens_R, y_RH * weights_S1[part])
            kept += [gate_up, y_RH]
        ctx.save_for_backward(x_TH, weights_S1, down, *ups, *kept)
        ctx.slots, ctx.num_ups = slots, len(ups)
        return out_TH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, weights_S1, down, *others = ctx.saved_tensors
        ups, kept = others[: ctx.num_ups], others[ctx.num_ups :]
        slots: _Slots = ctx.slots
        wanted_x, wanted_weights, _, wanted_down, wanted_up, *_ = ctx.needs_input_grad
        (gradient_TH,) = gradients
        dx_TH = torch.zeros_like(x_TH) if wanted_x else None
        dweights_S = x_TH.new_empty(len(slots.tokens_S))
        ddown = torch.empty_like(down) if wanted_down else None
        dups: list[Tensor | None] = [torch.empty_like(up) if wanted_up else None for up in ups]
        inner = down.shape[2]
        for expert, part in enumerate(slots.parts):
            tokens_R = slots.tokens_S[part]
            gate_up, y_RH = kept[2 * expert : 2 * expert + 2]
            if not len(tokens_R):
                for weight_gradients in (*dups, ddown):
                    if weight_gradients is not None:
                        weight_gradients[expert].zero_()
                continue
            dy_RH = gradient_TH.index_select(0, tokens_R)
            if wanted_weights:
                torch.sum(dy_RH * y_RH, 1, out=dweights_S[part])
            dy_RH.mul_(weights_S1[part])
            gate_RI, up_RI = gate_up[:, :inner], gate_up[:, inner:]
            dh_RI = product(dy_RH, down[expert].T)
            h_RI = functional.silu(gate_RI)
            dgate_up = torch.empty_like(gate_up)
            torch.mul(dh_RI, h_RI, out=dgate_up[:, inner:])
            if ddown is not None:
                ddown[expert] = product(dy_RH.T, h_RI.mul_(up_RI).T)
            torch.ops.aten.silu_backward.grad_input(dh_RI.mul_(up_RI), gate_RI, grad_input=dgate_up[:, :inner])
            halves = dgate_up.chunk(len(ups), 1)
            x_RH = x_TH.index_select(0, tokens_R)
            for up, dup, half in zip(ups, dups, halves, strict=True):
                if dup is not None:
                    dup[expert] = product(half.T, x_RH.T)
                if dx_TH is not None:
                    dx_TH.index_add_(0, tokens_R, product(half, up[expert].T))
        dweights_N = None
        if wanted_weights:
            dweights_N = torch.empty_like(slots.order_N, dtype=x_TH.dtype)
            dweights_N[slots.order_N] = dweights_S[slots.place_N]
        return dx_TH, dweights_N, None, ddown, *dups


_experts: Callable[..., Tensor] = _Experts.apply


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def on_cpu(x_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor, ups: tuple[Tensor, ...], down: Tensor) -> Tensor:
    """Output (T, H) of experts chosen by each token. ups: gate_up (E, 2I, H) with the gate first, or gate and up."""
    slots = _Slots.sort(chosen_TK.flatten(), chosen_TK.shape[-1], down.shape[0])
    return _experts(x_TH, weights_TK.flatten().to(x_TH.dtype), slots, down, *ups)


def sorted_on_cpu(x_ND: Tensor, counts_E: Tensor, ups: tuple[Tensor, ...], down: Tensor) -> Tensor:
    """The same for rows that are sorted by expert already; rows past the sum of the counts give zeros."""
    chosen_N = torch.arange(len(counts_E)).repeat_interleave(counts_E.to("cpu", torch.int64))
    slots = _Slots.sort(chosen_N, 1, down.shape[0])
    return _experts(x_ND, x_ND.new_ones(len(chosen_N)), slots, down, *ups)
