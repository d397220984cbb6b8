"""The balancing loss and the load that is logged, against a slow plain loop."""

import pytest
import torch
from torch import nn

from hpc.config import Model, Router
from hpc.model.build import build_model, model_config
from hpc.model.routing import RouterProbe, load_metrics, passport


class FakeTopKRouter(nn.Module):
    """Gives back the logits it is fed, as the first of a tuple, like transformers' routers."""

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return logits, None, None


def slow_loss(logits: list[list[float]], top_k: int) -> float:
    """One layer, one assignment at a time."""
    experts = len(logits[0])
    counts, mean = [0] * experts, [0.0] * experts
    for row in logits:
        weights = torch.tensor(row).softmax(-1).tolist()
        for expert in sorted(range(experts), key=lambda e: -weights[e])[:top_k]:
            counts[expert] += 1
        for expert in range(experts):
            mean[expert] += weights[expert] / len(logits)
    assigned = len(logits) * top_k
    return experts * sum(count / assigned * p for count, p in zip(counts, mean, strict=True))


def test_the_balancing_loss_is_that_of_a_plain_loop() -> None:
    model = nn.ModuleList([FakeTopKRouter(), FakeTopKRouter()])
    probe = RouterProbe(model, top_k=2)
    layers = [torch.randn(7, 5, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    for module, logits in zip(model, layers, strict=True):
        module(logits)
    heard = probe.collect()
    loss, counts = heard.aux_loss, heard.counts_LE
    assert float(loss) == pytest.approx(sum(slow_loss(layer.tolist(), 2) for layer in layers) / 2, rel=1e-5)
    assert counts.sum(-1).tolist() == [14, 14]


def test_the_loss_is_one_when_load_is_even_and_e_when_one_expert_gets_all() -> None:
    router = FakeTopKRouter()
    probe = RouterProbe(nn.ModuleList([router]), top_k=1)
    router(torch.eye(4) * 100)
    assert float(probe.collect().aux_loss) == pytest.approx(1.0)
    router(torch.tensor([[100.0, 0, 0, 0]] * 8))
    assert float(probe.collect().aux_loss) == pytest.approx(4.0)


def test_the_loss_reaches_the_routers_of_a_real_model() -> None:
    model = Model(hidden_size=32, num_layers=2, num_attention_heads=2, expert_size=16)
    built = build_model(model_config(model, Router(num_experts=4), 64, 16, 0), seed=0)
    probe = RouterProbe(built, top_k=2)
    built(input_ids=torch.randint(64, (2, 16)))
    heard = probe.collect()
    loss, counts = heard.aux_loss, heard.counts_LE
    assert counts.shape == (2, 4)
    loss.backward()
    gradients = [p.grad for name, p in built.named_parameters() if name.endswith("mlp.gate.weight")]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_load_metrics_of_an_even_and_a_collapsed_layer() -> None:
    metrics = load_metrics(torch.tensor([[5.0, 5, 5, 5], [20, 0, 0, 0]]))
    assert metrics["router_load"] == [[0.25] * 4, [1.0, 0, 0, 0]]
    assert metrics["router_max_over_mean"] == 4.0
    assert metrics["router_min_entropy"] == pytest.approx(0.0, abs=1e-6)


def test_the_z_loss_is_that_of_a_plain_loop() -> None:
    model = nn.ModuleList([FakeTopKRouter(), FakeTopKRouter()])
    probe = RouterProbe(model, top_k=2)
    layers = [torch.randn(7, 5, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    for module, logits in zip(model, layers, strict=True):
        module(logits)
    squares = [float(row.exp().sum().log()) ** 2 for layer in layers for row in layer]
    assert float(probe.collect().z_loss) == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_a_passport_counts_tokens_once() -> None:
    found = passport(torch.tensor([[3.0, 5.0], [8.0, 0.0]]), top_k=2, first_step=11, last_step=20)
    assert (found["tokens"], found["assignments"]) == (4, [[3, 5], [8, 0]])
