"""What a model may look like, and one line for what it may not."""

from typing import Any

import pytest
from pydantic import ValidationError

from hpc.config import Model, Router, Training

SHAPE = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "expert_size": 32}


def training(model: dict[str, Any], router: dict[str, Any], **keys: Any) -> Training:
    return Training.model_validate(
        {
            "model": {**SHAPE, **model},
            "router": {"num_experts": 8, **router},
            "batches": {"seq_len": 8, "micro_batch_size": 1, "tokens_per_step": 8},
            "steps": 100,
            "optimizer": {"lr": 1e-3},
            **keys,
        }
    )


@pytest.mark.parametrize(
    ("model", "router", "message"),
    [
        ({"num_dense_layers": 1}, {}, "num_dense_layers belongs to deepseek_v3, qwen3_moe has no such thing"),
        ({"architecture": "deepseek_v3", "num_dense_layers": 2}, {}, "num_dense_layers = 2 leaves no MoE layer of 2"),
        ({"architecture": "deepseek_v3"}, {}, "deepseek_v3 has at least one: set it to 1"),
        ({}, {"bias_update_rate": 0.001}, "router.bias_update_rate = 0.001 has no place in qwen3_moe"),
        ({}, {"num_shared_experts": 1}, "router.num_shared_experts = 1 has no place in qwen3_moe"),
        ({}, {"num_groups": 3}, "8 experts do not make 3 groups of at least 2: choose a divisor of 4"),
        ({}, {"num_groups": 4, "top_groups": 1, "top_k": 4}, "top_groups = 1 of 4 groups do not hold top_k = 4"),
        ({"latent_attention": {"kv_rank": 8, "nope_head_dim": 8, "rope_head_dim": 7, "value_head_dim": 8}}, {},
         "rope_head_dim = 7 is odd, rotations take pairs: try 8"),
    ],
)  # fmt: skip
def test_what_an_architecture_does_not_have_is_refused_with_a_way_out(
    model: dict[str, Any], router: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        training(model, router)


def test_latent_attention_has_widths_of_the_usual_head() -> None:
    latent = Model.model_validate({**SHAPE, "architecture": "deepseek_v3"}).latent
    assert latent.nope_head_dim + latent.rope_head_dim == latent.value_head_dim == 16
    assert (latent.kv_rank, latent.query_rank) == (16, None)


def test_dense_layers_are_as_wide_as_the_experts_of_one_token() -> None:
    model = Model.model_validate({**SHAPE, "architecture": "deepseek_v3", "num_dense_layers": 1})
    assert model.dense_width(Router(num_experts=8, top_k=3, num_shared_experts=1)) == 4 * 32


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "jagged_cosine"}, "jagged_cosine needs it"),
        ({"kind": "cosine", "restart_every_steps": 10}, "the others have no restarts"),
        ({"kind": "jagged_cosine", "restart_every_steps": 10, "restart_warmup_steps": 10}, "try 1"),
    ],
)
def test_restarts_belong_to_the_jagged_schedule(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        training({}, {}, schedule=schedule)
