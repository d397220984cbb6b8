"""Matrix products through oneDNN, and the loss without logits: the same numbers as PyTorch's."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hpc.config import Model, Router
from hpc.model import loss as losses
from hpc.model.build import build_model, model_config
from hpc.model.loss import LossHead, mean_loss
from hpc.model.products import linear, padded, use_products


@pytest.mark.parametrize(("rows", "width", "out"), [(7, 16, 48), (300, 64, 16), (64, 32, 256)])
def test_a_linear_layer_has_the_values_and_gradients_of_torchs(rows: int, width: int, out: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(width, 2, rows).permute(1, 2, 0).requires_grad_()  # not contiguous
    weight = torch.randn(out, width, requires_grad=True)
    wanted = functional.linear(x, weight)
    found = linear(x, weight)
    assert torch.allclose(found, wanted, atol=1e-4)
    head = torch.randn_like(wanted)
    for gradient, other in zip(
        torch.autograd.grad(found, (x, weight), head), torch.autograd.grad(wanted, (x, weight), head), strict=True
    ):
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-3)


def test_padding_is_little_and_leaves_few_shapes() -> None:
    sizes = [padded(rows) for rows in range(4097)]
    assert sizes[0] == 0
    assert all(rows <= size <= rows * 33 / 32 for rows, size in enumerate(sizes))
    assert len(set(sizes[512:1024])) <= 33


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.T).flatten(0, 1).float(), targets.flatten())


@pytest.mark.parametrize("ignored", [0, 5])
def test_the_loss_without_logits_is_the_loss(ignored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows that do not fill the last visit."""
    monkeypatch.setattr(losses, "ROWS", 7)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 16, requires_grad=True), torch.randn(31, 16, requires_grad=True)
    targets = torch.randint(0, 31, (2, 9))
    targets.view(-1)[:ignored] = -100
    wanted, found = plain(hidden, weight, targets), mean_loss(hidden, weight, targets)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-6)
    for gradient, other in zip(
        torch.autograd.grad(2 * found, (hidden, weight)), torch.autograd.grad(2 * wanted, (hidden, weight)), strict=True
    ):
        assert torch.allclose(gradient, other, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_no_gradient_at_all_is_fine() -> None:
    hidden, weight, targets = torch.randn(1, 9, 16, requires_grad=True), torch.randn(31, 16), torch.arange(9)[None]
    mean_loss(hidden, weight, targets).backward()
    assert weight.grad is None
    with torch.no_grad():
        assert float(mean_loss(hidden, weight, targets)) == pytest.approx(
            float(plain(hidden, weight, targets).detach())
        )


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "olmoe"])
def test_a_model_gives_its_loss_or_its_logits(architecture: str) -> None:
    shape: Any = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "expert_size": 16}
    model = build_model(
        model_config(Model(architecture=architecture, **shape), Router(num_experts=4), 61, 16, 0), seed=0
    )
    ids = torch.randint(0, 61, (2, 17))
    logits = model(input_ids=ids[:, :-1]).logits
    wanted = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    use_products(model)
    head = LossHead(model)
    found = head.loss(lambda: model(input_ids=ids[:, :-1]).logits, ids[:, 1:])
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-6), name
    assert torch.allclose(model(input_ids=ids[:, :-1]).logits, logits, atol=1e-5)
