"""Importance of columns against a slow loop over tokens, for every kind of matrix, under the names of the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc.shrink.gguf_quantize import quantize
from hpc.shrink.importance import collect, unseen
from tests.shrink import wide
from tests.shrink.conftest import Converted

IDS = torch.tensor(wide.some_ids()[:12]).view(2, 6)


def test_an_expert_counts_the_tokens_that_it_was_sent(converted: Converted) -> None:
    model = converted("qwen3_moe")[0]
    seen: list[tuple[Any, Any]] = []
    experts = model.model.layers[1].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    importance = collect(model, IDS)
    handle.remove()
    assert len(seen) == len(IDS)
    states, chosen = (torch.cat(parts) for parts in zip(*seen, strict=True))
    for expert in range(8):
        mine = [state for state, some in zip(states, chosen, strict=True) if expert in some.tolist()]
        width = experts.gate_up_proj.shape[1] // 2
        into, between = np.zeros(256), np.zeros(width)
        for state in mine:
            into += state.detach().numpy() ** 2 / len(mine)
            both = experts.gate_up_proj[expert].detach() @ state
            between += (torch.nn.functional.silu(both[:width]) * both[width:]).numpy() ** 2 / len(mine)
        for part, wanted in (("gate", into), ("up", into), ("down", between)):
            assert importance[f"blk.1.ffn_{part}_exps.weight"][expert] == pytest.approx(wanted, rel=1e-4, abs=1e-12)
    idle = sorted(set(range(8)) - set(chosen.flatten().tolist()))
    assert unseen(importance).get("blk.1.ffn_up_exps.weight", []) == idle


def test_an_expert_that_no_token_met_is_named(converted: Converted) -> None:
    importance = collect(converted("qwen3_moe")[0], IDS[:1, :1])
    assert {name: len(experts) for name, experts in unseen(importance).items()} == {
        f"blk.{layer}.ffn_{part}_exps.weight": 6 for layer in (0, 1) for part in ("gate", "up", "down")
    }


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_every_name_is_a_tensor_of_the_file(kind: str, converted: Converted, tmp_path: Path) -> None:
    model, _, file = converted(kind)
    importance = collect(model, IDS)
    assert len(importance) >= 2 * 7
    quantize(file, tmp_path / "q.gguf", "q4_0", 1, {}, importance)
    assert not any(module._forward_pre_hooks for module in model.modules())
