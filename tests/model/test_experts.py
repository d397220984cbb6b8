"""Expert compute: every backend is the reference, in a transformers model and in DeepSpeed's local experts."""

import pytest
import torch
from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor

from hpc.config import Model, Router
from hpc.errors import ConfigError
from hpc.model.build import build_model, model_config
from hpc.model.experts import BACKENDS, check_available, swiglu_experts, use_backend
from hpc.model.experts_cpu import on_cpu, sorted_on_cpu

HERE = [name for name in BACKENDS if name != "megablocks"]
ROUTER = Router(num_experts=8, top_k=2)


def model_of(architecture: str) -> torch.nn.Module:
    shape = Model.model_validate(
        {"architecture": architecture, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "expert_size": 48}
    )
    return build_model(model_config(shape, ROUTER, 97, 32, 0), seed=3)


def gradients(model: torch.nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1).flatten()).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "olmoe", "mixtral"])
@pytest.mark.parametrize("backend", HERE)
def test_a_transformers_model_computes_the_same_with_every_backend(architecture: str, backend: str) -> None:
    ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    model = model_of(architecture)
    expected, wanted = gradients(model, ids)
    use_backend(model, backend)
    logits, found = gradients(model, ids)
    assert torch.allclose(logits, expected, atol=2e-6)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=2e-6), name


@pytest.mark.parametrize("backend", HERE)
def test_deepspeeds_local_experts_compute_the_same_with_every_backend(backend: str) -> None:
    torch.manual_seed(0)
    layer = GroupedExperts(dim=32, hidden_dim=48, num_experts=4, use_grouped_mm=False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    counts = torch.tensor([5, 0, 9, 2])
    x = torch.randn(20, 32)  # four rows of padding
    expected = layer(x, counts)[:16]
    use_backend(torch.nn.ModuleList([layer]), backend)
    assert torch.allclose(layer(x, counts)[:16], expected, atol=1e-6)


@pytest.mark.parametrize("experts", [2, 24])
def test_expert_by_expert_in_cache_is_the_reference_with_padding_and_idle_experts(experts: int) -> None:
    torch.manual_seed(1)
    gate_up, down = torch.randn(experts, 32, 16) / 4, torch.randn(experts, 16, 16) / 4
    x, weights = torch.randn(150, 16), torch.rand(150, 2)
    chosen = torch.stack([torch.randperm(experts)[:2] for _ in range(150)]) % max(2, experts - 3)  # the last ones idle
    leaves = [x, weights, gate_up, down]
    for leaf in leaves:
        leaf.requires_grad_()
    expected = swiglu_experts(BACKENDS["loop"], x, chosen, weights, gate_up, down)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    found = on_cpu(x, chosen, weights, (gate_up,), down)
    assert torch.allclose(found, expected, atol=1e-6)
    for gradient, other in zip(torch.autograd.grad(found.square().sum(), leaves), wanted, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-5)


def test_frozen_experts_get_no_gradient_and_split_ones_the_same() -> None:
    torch.manual_seed(2)
    gate, up, down = (torch.randn(3, 8, 8) for _ in range(3))
    counts, x = torch.tensor([4, 0, 3]), torch.randn(9, 8, requires_grad=True)  # two rows of padding
    y = sorted_on_cpu(x, counts, (gate, up), down)
    rows = torch.nn.functional.silu(x[4:7] @ gate[2].T) * (x[4:7] @ up[2].T) @ down[2].T
    assert torch.allclose(y[4:7], rows, atol=1e-5)
    (found,) = torch.autograd.grad(y[:7].sum(), x)
    (wanted,) = torch.autograd.grad(rows.sum(), x)
    assert torch.allclose(found[4:7], wanted[4:7], atol=1e-5)
    assert not found[7:].any()


def test_a_swapped_gate_and_up_is_no_small_difference() -> None:
    torch.manual_seed(0)
    gate_up, down, x = torch.randn(4, 32, 16), torch.randn(4, 16, 16), torch.randn(10, 16)
    chosen, weights = torch.randint(0, 4, (10, 2)), torch.rand(10, 2)
    right = swiglu_experts(BACKENDS["loop"], x, chosen, weights, gate_up, down)
    swapped = swiglu_experts(BACKENDS["loop"], x, chosen, weights, gate_up.roll(16, 1), down)
    assert not torch.allclose(right, swapped, atol=0.1)


def test_an_expert_without_tokens_gets_a_zero_gradient_not_none() -> None:
    gate_up = torch.randn(3, 8, 4, requires_grad=True)
    down = torch.randn(3, 4, 4, requires_grad=True)
    chosen = torch.zeros(5, 1, dtype=torch.int64)
    for backend in HERE:
        gate_up.grad = None
        swiglu_experts(
            BACKENDS[backend], torch.randn(5, 4), chosen, torch.ones(5, 1), gate_up, down
        ).square().mean().backward()
        assert gate_up.grad is not None
        assert gate_up.grad[1:].abs().sum() == 0


def test_an_absent_backend_says_how_to_get_it() -> None:
    with pytest.raises(ConfigError, match=r"pip install --no-deps .* megablocks==0\.10\.0"):
        check_available("megablocks", "cuda", "bf16")
    check_available("grouped_mm", "cpu", "fp32")
    with pytest.raises(ConfigError, match=r"train\.precision = fp32, expert_compute = megablocks computes bf16 only"):
        check_available("megablocks", "cuda", "fp32")
