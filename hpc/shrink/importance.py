"""How much each input column of each matrix counts: mean squared activations, llama.cpp's importance matrix.

Collected on transformers' model, expert by expert over the tokens that the router sends it; names are those of a .gguf
file. Rounding then keeps small the errors that meet large activations (ikawrakow, llama.cpp PR 4861).

Shape letters: E experts, C columns (inputs of a matrix), N tokens, K experts per token.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

LINEAR = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_a_proj": "attn_q_a", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}  # fmt: skip
"""A layer's linear modules: transformers' name -> llama.cpp's. Router and head are not quantized by importance."""


class _Mean:
    """Sums of squares by row, and how many tokens went into each."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None

    def add(self, row: int, rows: int, inputs: torch.Tensor) -> None:
        """inputs: (N, C) that met matrix `row` of `rows`."""
        if self.sums is None or self.counts is None:
            self.sums, self.counts = torch.zeros(rows, inputs.shape[-1], dtype=torch.float64), torch.zeros(rows, 1)
        self.sums[row] += inputs.double().square().sum(0)
        self.counts[row] += len(inputs)

    def values(self) -> npt.NDArray[np.float32]:
        """(rows, C); zeros in a row that no token met."""
        assert self.sums is not None
        assert self.counts is not None
        return (self.sums / self.counts.clamp(min=1)).float().numpy()


def collect(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, npt.NDArray[np.float32]]:
    """Tensor of a .gguf file -> importance of its columns, (C) or for experts (E, C), over sequences ids (B, S).

    A row of zeros is an expert that no token was sent to; its matrices are rounded without (`unseen` counts them).
    """
    means: dict[str, _Mean] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            for handle in _watch(name, module, means):
                hooks.callback(handle.remove)
        for row in ids:
            model(input_ids=row[None])
    return {name: mean.values() if "_exps." in name else mean.values()[0] for name, mean in means.items()}


def unseen(importance: dict[str, npt.NDArray[np.float32]]) -> dict[str, list[int]]:
    """Tensor of experts -> the experts that no token was sent to."""
    found = {name: np.flatnonzero(~values.any(1)).tolist() for name, values in importance.items() if values.ndim == 2}
    return {name: experts for name, experts in found.items() if experts}


def _watch(name: str, module: Any, means: dict[str, _Mean]) -> Iterator[Any]:
    """Hooks on a module, if it is one whose matrices count."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 4:
        return
    layer, own = parts[2], ".".join(parts[3:])
    if own in LINEAR:
        mean = means.setdefault(f"blk.{layer}.{LINEAR[own]}.weight", _Mean())
        yield module.register_forward_pre_hook(lambda _, inputs: mean.add(0, 1, inputs[0].flatten(0, -2)))
    elif own == "mlp.experts":
        into, between = _Mean(), _Mean()
        means[f"blk.{layer}.ffn_gate_exps.weight"] = means[f"blk.{layer}.ffn_up_exps.weight"] = into
        means[f"blk.{layer}.ffn_down_exps.weight"] = between
        yield module.register_forward_pre_hook(lambda experts, inputs: _experts(experts, inputs, into, between))


def _experts(experts: Any, inputs: tuple[Any, ...], into: _Mean, between: _Mean) -> None:
    """The inputs of both kinds of matrices of each expert. inputs: states (N, C), chosen (N, K), their weights."""
    states, chosen = inputs[0].flatten(0, -2), inputs[1]
    count = len(experts.gate_up_proj)
    for expert in range(count):
        mine = states[(chosen == expert).any(-1)]
        into.add(expert, count, mine)
        gate, up = torch.nn.functional.linear(mine, experts.gate_up_proj[expert]).chunk(2, -1)
        between.add(expert, count, experts.act_fn(gate) * up)
