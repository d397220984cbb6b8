"""Which parameter is decayed, which is Muon's."""

from typing import Any

import pytest

from hpc.config import Model, Optimizer, Router
from hpc.model.build import build_model, model_config
from hpc.train.optimizer import parameter_groups

MODEL = Model(architecture="deepseek_v3", hidden_size=32, num_layers=2, num_attention_heads=2, expert_size=16,
              num_dense_layers=1)  # fmt: skip


def named_groups(kind: str) -> dict[str, set[str]]:
    built: Any = build_model(model_config(MODEL, Router(num_experts=4, num_shared_experts=1), 64, 16, 0), seed=0)
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    groups = parameter_groups(built, Optimizer.model_validate({"kind": kind, "lr": 2e-3, "muon_lr": 0.02}))
    found = {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}
    assert sum(len(group) for group in found.values()) == len(names), "every parameter is in one group"
    return found


def test_norms_and_the_embedding_are_not_decayed_and_all_else_is() -> None:
    groups = named_groups("adamw")
    assert set(groups) == {"decayed", "undecayed"}
    assert all("norm" in name or name == "model.embed_tokens.weight" for name in groups["undecayed"])
    assert {"lm_head.weight", "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.down_proj",
            "model.layers.0.self_attn.o_proj.weight"} <= groups["decayed"]  # fmt: skip


def test_muon_takes_the_matrices_of_the_blocks_and_leaves_router_and_head_to_adamw() -> None:
    groups = named_groups("muon")
    assert groups["decayed"] == {"lm_head.weight", "model.layers.1.mlp.gate.weight"}
    assert "model.layers.1.mlp.experts.gate_up_proj" in groups["muon"]
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in groups["muon"]
    assert "model.layers.0.mlp.down_proj.weight" in groups["muon"]
    assert not any("norm" in name or "embed" in name for name in groups["muon"])


@pytest.mark.parametrize(("name", "scale"), [("muon", 10.0), ("decayed", 1.0)])
def test_one_schedule_serves_both_learning_rates(name: str, scale: float) -> None:
    built: Any = build_model(model_config(MODEL, Router(num_experts=4, num_shared_experts=1), 64, 16, 0), seed=0)
    groups = parameter_groups(built, Optimizer(kind="muon", lr=2e-3, muon_lr=0.02))
    assert next(group["lr_scale"] for group in groups if group["name"] == name) == pytest.approx(scale)
