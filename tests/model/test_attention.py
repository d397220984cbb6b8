"""Blockwise causal attention: PyTorch's values and gradients, in a model too."""

import pytest
import torch
from torch.nn import functional

from hpc.config import Model, Router
from hpc.model import attention
from hpc.model.attention import NAME, causal_attention, use_attention
from hpc.model.build import build_model, model_config


@pytest.mark.parametrize("length", [1, 100, 300])  # one block, part of one, two and a part
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_values_and_gradients_are_those_of_pytorch(length: int, kv_heads: int) -> None:
    torch.manual_seed(length)
    query = torch.randn(2, 4, length, 16, requires_grad=True)
    key = (3 * torch.randn(2, kv_heads, length, 16)).requires_grad_()
    value = torch.randn(2, length, kv_heads, 16).transpose(1, 2).requires_grad_()
    wanted = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    found = causal_attention(query, key, value, 0.25)
    assert torch.allclose(found, wanted, atol=2e-6)
    leaves, head = (query, key, value), torch.randn_like(wanted)
    for gradient, other in zip(
        torch.autograd.grad(found, leaves, head), torch.autograd.grad(wanted, leaves, head), strict=True
    ):
        assert torch.allclose(gradient, other, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "olmoe"])
def test_a_model_computes_the_same_through_it(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return causal_attention(*arguments)

    monkeypatch.setattr(attention, "causal_attention", counted)
    monkeypatch.setattr(attention, "SHORTEST", 8)
    monkeypatch.setattr(attention, "serves", lambda *_: True)
    shape = {"architecture": architecture, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4,
             "expert_size": 16}  # fmt: skip
    config = model_config(Model.model_validate(shape), Router(num_experts=4), 61, 16, 0)
    model = build_model(config, seed=0)
    ids = torch.randint(0, 61, (2, 16))
    wanted = model(input_ids=ids, use_cache=False).logits
    use_attention(model)
    assert model.config._attn_implementation == NAME
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, wanted, atol=2e-6)
    assert len(calls) == 2
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    model(input_ids=ids, attention_mask=padding, use_cache=False)
    assert len(calls) == 2, "a mask is PyTorch's business"
