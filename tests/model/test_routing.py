"""The balancing loss and the load that is logged, against a slow plain loop."""

from typing import Any

import pytest
import torch
from torch import nn

from hpc.config import Model, Router
from hpc.model.build import build_model, model_config
from hpc.model.routing import (
    RouterProbe,
    find_routers,
    load_metrics,
    passport,
    route_in_fp32,
    router_biases,
    update_biases,
)


class FakeTopKRouter(nn.Module):
    """Gives back the logits it is fed and the best of them, like transformers' routers."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        return logits, None, logits.topk(self.top_k, -1).indices


class FakeModel(nn.Module):
    """One router per layer, each fed logits of its own."""

    def __init__(self, layers: int, top_k: int) -> None:
        super().__init__()
        self.routers = nn.ModuleList([FakeTopKRouter(top_k) for _ in range(layers)])

    def forward(self, *logits: torch.Tensor) -> None:
        for router, layer in zip(self.routers, logits, strict=True):
            router(layer)


LAYERS = [torch.randn(7, 5, generator=torch.Generator().manual_seed(n)) for n in range(2)]


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
    model = FakeModel(2, top_k=2)
    probe = RouterProbe(model)
    model(*LAYERS)
    heard = probe.collect()
    assert float(heard.aux_loss) == pytest.approx(sum(slow_loss(x.tolist(), 2) for x in LAYERS) / 2, rel=1e-5)
    assert heard.counts_LE.sum(-1).tolist() == [14, 14]


def test_the_loss_over_a_step_weighs_scores_with_the_counts_of_all_its_micro_batches() -> None:
    model = FakeModel(1, top_k=1)
    probe = RouterProbe(model)
    model(torch.tensor([[9.0, 0.0], [9.0, 0.0]]))
    first = probe.collect()
    scores = torch.tensor([[0.0, 1.0]])
    model(scores)
    over_step = float(probe.collect(first.counts_LE).aux_loss)
    wanted = torch.tensor([2 / 3, 1 / 3]) @ scores[0].softmax(-1) * 2
    assert over_step == pytest.approx(float(wanted), rel=1e-5)


def test_the_loss_is_one_when_load_is_even_and_e_when_one_expert_gets_all() -> None:
    model = FakeModel(1, top_k=1)
    probe = RouterProbe(model)
    model(torch.eye(4) * 100)
    assert float(probe.collect().aux_loss) == pytest.approx(1.0)
    model(torch.tensor([[100.0, 0, 0, 0]] * 8))
    assert float(probe.collect().aux_loss) == pytest.approx(4.0)


def test_what_the_backward_pass_computes_again_is_not_counted_twice() -> None:
    model = FakeModel(1, top_k=1)
    probe = RouterProbe(model)
    model(torch.eye(4))
    assert float(probe.collect().counts_LE.sum()) == 4
    model.routers[0](torch.eye(4))  # as recomputation calls it, below the model
    model(torch.eye(4))
    assert float(probe.collect().counts_LE.sum()) == 4


def test_the_loss_reaches_the_routers_of_a_real_model() -> None:
    model = Model(hidden_size=32, num_layers=2, num_attention_heads=2, expert_size=16)
    built = build_model(model_config(model, Router(num_experts=4), 64, 16, 0), seed=0)
    probe = RouterProbe(built)
    built(input_ids=torch.randint(64, (2, 16)))
    heard = probe.collect()
    loss, counts = heard.aux_loss, heard.counts_LE
    assert counts.shape == (2, 4)
    loss.backward()
    gradients = [p.grad for name, p in built.named_parameters() if name.endswith("mlp.gate.weight")]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_load_metrics_of_an_even_and_a_collapsed_layer() -> None:
    metrics = load_metrics(torch.tensor([[5.0, 5, 5, 5], [20, 0, 0, 0]]), {}, tokens=10, top_k=2)
    assert metrics["router_load"] == [[0.25] * 4, [1.0, 0, 0, 0]]
    assert metrics["router_max_over_mean"] == 4.0
    assert metrics["router_max_over_mean_by_layer"] == [1.0, 4.0]
    assert metrics["router_entropy"] == pytest.approx([1.0, 0.0], abs=1e-5)
    assert metrics["router_min_entropy"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["router_dropped"] == 0
    assert load_metrics(torch.tensor([[5.0, 5, 5, 4]]), {}, tokens=10, top_k=2)["router_dropped"] == 1


def test_the_z_loss_is_that_of_a_plain_loop() -> None:
    model = FakeModel(2, top_k=2)
    probe = RouterProbe(model)
    model(*LAYERS)
    squares = [float(row.exp().sum().log()) ** 2 for layer in LAYERS for row in layer]
    assert float(probe.collect().z_loss) == pytest.approx(sum(squares) / len(squares), rel=1e-5)


DEEPSEEK = Model(architecture="deepseek_v3", hidden_size=32, num_layers=3, num_attention_heads=2, expert_size=16,
                 num_dense_layers=1)  # fmt: skip


def deepseek(**router: float) -> Any:
    wanted = Router.model_validate({"num_experts": 4, "top_k": 2, "num_shared_experts": 1, **router})
    return build_model(model_config(DEEPSEEK, wanted, 64, 16, 0), seed=0)


def test_the_bias_of_an_expert_goes_up_when_it_had_too_little_and_changes_only_the_choice() -> None:
    built = deepseek()
    probe, ids = RouterProbe(built), torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([[10.0, 2, 2, 2], [4, 4, 4, 4]])
    update_biases(built, counts, rate=0.25)
    first, second = router_biases(built).values()
    assert first.tolist() == [-0.25, 0.25, 0.25, 0.25]
    assert second.tolist() == [0, 0, 0, 0]
    built(input_ids=ids)
    before = probe.collect().counts_LE
    for bias in router_biases(built).values():
        bias.copy_(torch.tensor([5.0, 5, -5, -5]))
    built(input_ids=ids)
    assert probe.collect().counts_LE.tolist() == [[32, 32, 0, 0]] * 2
    assert before.tolist() != [[32, 32, 0, 0]] * 2


def test_balancing_by_bias_evens_out_a_router_that_prefers_one_expert() -> None:
    built = deepseek()
    with torch.no_grad():
        for bias in router_biases(built).values():
            bias[0] = 0.1
    probe, ids = RouterProbe(built), torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(1))
    worst = []
    with torch.no_grad():
        for _ in range(60):
            built(input_ids=ids)
            counts = probe.collect().counts_LE
            update_biases(built, counts, rate=0.002)
            worst.append(float((counts.max(-1).values / counts.mean(-1)).max()))
    assert worst[0] == 2.0
    assert worst[-1] < 1.15


def test_sigmoid_scores_are_normalised_for_the_balancing_loss() -> None:
    built = deepseek()
    probe = RouterProbe(built)
    heard_logits: list[torch.Tensor] = []
    for _, router in find_routers(built):
        router.register_forward_hook(lambda _m, _i, output: heard_logits.append(output[0]))
    built(input_ids=torch.randint(64, (2, 16)))
    heard = probe.collect()
    shares = [x.sigmoid() / x.sigmoid().sum(-1, keepdim=True) for x in heard_logits]
    wanted = sum(4 * (c / c.sum() * s.mean(0)).sum() for c, s in zip(heard.counts_LE, shares, strict=True)) / 2
    assert float(heard.aux_loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "olmoe", "mixtral"])
def test_a_router_in_fp32_is_transformers_own_and_stays_fp32_in_a_bf16_model(architecture: str) -> None:
    model = Model.model_validate({"architecture": architecture, "hidden_size": 32, "num_layers": 1,
                                  "num_attention_heads": 2, "expert_size": 16})  # fmt: skip
    built = build_model(model_config(model, Router(num_experts=6), 64, 16, 0), seed=0)
    ((_, router),) = find_routers(built)
    x = torch.randn(9, 32)
    wanted = router(x)
    route_in_fp32(built)
    for ours, theirs in zip(router(x), wanted, strict=True):
        assert torch.equal(ours, theirs)
    logits, weights, _ = router.bfloat16()(x.bfloat16())
    assert (logits.dtype, weights.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(logits, x.bfloat16().float() @ router.weight.float().T)


def test_a_passport_counts_tokens_once() -> None:
    found = passport(torch.tensor([[3.0, 5.0], [8.0, 0.0]]), top_k=2, first_step=11, last_step=20)
    assert (found["tokens"], found["assignments"]) == (4, [[3, 5], [8, 0]])
