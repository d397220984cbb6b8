"""How blocks compute: packed documents kept apart, recomputation, and initial weights."""

from typing import Any

import pytest
import torch

from hpc.config import Model, Router, Training
from hpc.errors import ConfigError
from hpc.model.blocks import prepare_blocks
from hpc.model.build import build_model, model_config

ARCHITECTURES = ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3"]


def training(architecture: str, **keys: Any) -> Training:
    router: dict[str, Any] = {"num_experts": 4, "top_k": 2}
    if architecture == "deepseek_v3":
        router["num_shared_experts"] = 1
    return Training.model_validate(
        {
            "model": {"architecture": architecture, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2,
                      "expert_size": 24, "initializer_range": 0.2},
            "router": router,
            "batches": {"seq_len": 24, "micro_batch_size": 2, "tokens_per_step": 48},
            "steps": 1, "optimizer": {"lr": 1e-3}, **keys,
        }
    )  # fmt: skip


def build(settings: Training) -> Any:
    return build_model(model_config(settings.model, settings.router, 64, 24, 0), 5, settings.model.initialization)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_documents_packed_in_one_sequence_do_not_see_each_other(architecture: str) -> None:
    model = build(training(architecture)).eval()
    first, second = torch.randint(64, (2, 1, 12), generator=torch.Generator().manual_seed(2))
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(12), torch.arange(12)])[None]
    with torch.no_grad():
        apart = torch.cat([model(input_ids=part).logits for part in (first, second)], 1)
        together = model(input_ids=packed, position_ids=positions, use_cache=False).logits
        crossing = model(input_ids=packed, use_cache=False).logits
    assert torch.allclose(together, apart, atol=2e-5)
    assert not torch.allclose(crossing[:, 12:], apart[:, 12:], atol=1e-2)


def gradients(settings: Training) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a training step, and how often an attention block was computed."""
    model = build(settings).train()
    prepare_blocks(model, settings)
    calls = []
    for name, module in model.named_modules():
        if name.endswith((".k_proj", ".kv_a_proj_with_mqa")):
            module.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(2))
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1).flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters()}, len(calls)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("recompute", ["attention", "full"])
def test_recomputation_changes_no_gradient(architecture: str, recompute: str) -> None:
    kept, once = gradients(training(architecture))
    again, twice = gradients(training(architecture, recompute=recompute))
    assert (once, twice) == (2, 4)
    for name, gradient in kept.items():
        assert torch.equal(gradient, again[name]), name


def test_an_attention_kernel_that_is_not_installed_is_refused_in_one_line() -> None:
    settings = training("qwen3_moe", attention_kernel="flash_attention_2")
    with pytest.raises(ConfigError, match=r"train\.attention_kernel = flash_attention_2 cannot be had here"):
        prepare_blocks(build(settings), settings)


def test_depth_scaled_weights_start_smaller_where_they_write_into_the_residual_stream() -> None:
    model = {"architecture": "qwen3_moe", "hidden_size": 64, "num_layers": 8, "num_attention_heads": 2,
             "expert_size": 64, "initialization": "depth_scaled"}  # fmt: skip
    shape, router = Model.model_validate(model), Router(num_experts=4)
    built = build_model(model_config(shape, router, 64, 24, 0), 0, shape.initialization)
    for name, parameter in built.named_parameters():
        if parameter.dim() > 1:
            writes = name.endswith(("o_proj.weight", "experts.down_proj"))
            assert float(parameter.detach().std()) == pytest.approx(0.02 / 4 if writes else 0.02, rel=0.1), name


def test_the_same_seed_gives_the_same_weights() -> None:
    one, other = build(training("mixtral")), build(training("mixtral"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
