"""The plan's arithmetic, against the models themselves and against published figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from hpc.config import LatentAttention, Model, Router, RunConfig
from hpc.config.load import load_config
from hpc.plan.flops import forward_flops_per_token, model_flops_utilization, training_flops_per_token
from hpc.plan.params import count, count_adapter
from hpc.plan.plan import plan
from hpc.plan.quantity import amount
from hpc.plan.reused import shape_of
from hpc.plan.show import duration, energy
from slurm.site import load_site
from tests.conftest import Launch


@pytest.mark.parametrize(
    ("architecture", "kv_heads"), [("qwen3_moe", 4), ("qwen3_moe", 2), ("olmoe", 4), ("mixtral", 2)]
)
def test_parameters_are_those_that_transformers_builds(architecture: str, kv_heads: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from hpc.model.build import model_config

    model = Model(
        architecture=architecture,
        hidden_size=96, num_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads, expert_size=80,
    )  # fmt: skip
    router = Router(num_experts=6, top_k=2)
    with torch.device("meta"):
        built: Any = AutoModelForCausalLM.from_config(model_config(model, router, 1000, 64, 0))
    assert count(model, router, 1000).total == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("query_rank", [None, 24])
@pytest.mark.parametrize("dense_layers", [0, 2])
def test_parameters_of_deepseek_v3_are_those_that_transformers_builds(
    query_rank: int | None, dense_layers: int
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from hpc.model.build import model_config

    latent = {"kv_rank": 20, "query_rank": query_rank, "nope_head_dim": 10, "rope_head_dim": 6, "value_head_dim": 14}
    model = Model.model_validate(
        {"architecture": "deepseek_v3", "hidden_size": 96, "num_layers": 3, "num_attention_heads": 4, "expert_size": 80,
         "num_dense_layers": dense_layers, "latent_attention": latent}
    )  # fmt: skip
    router = Router(num_experts=6, top_k=2, num_shared_experts=2)
    with torch.device("meta"):
        built: Any = AutoModelForCausalLM.from_config(model_config(model, router, 1000, 64, 0))
    assert count(model, router, 1000).total == sum(p.numel() for p in built.parameters())


def test_deepseek_v3s_published_size_comes_out() -> None:
    """DeepSeek-V3: 671 B parameters, 37 B active (arXiv:2412.19437, section 1), without the MTP module."""
    latent = {"kv_rank": 512, "query_rank": 1536, "nope_head_dim": 128, "rope_head_dim": 64, "value_head_dim": 128}
    model = Model.model_validate(
        {"architecture": "deepseek_v3", "hidden_size": 7168, "num_layers": 61, "num_attention_heads": 128,
         "expert_size": 2048, "num_dense_layers": 3, "dense_size": 18432, "latent_attention": latent}
    )  # fmt: skip
    router = Router(num_experts=256, top_k=8, num_shared_experts=1, num_groups=8, top_groups=4, scaling_factor=2.5)
    parameters = count(model, router, 129280)
    assert parameters.total == pytest.approx(671e9, rel=2e-3)
    assert parameters.active == pytest.approx(37e9, rel=2e-2)


def test_olmoes_published_size_comes_out() -> None:
    """OLMoE-1B-7B: 6.92 B parameters, 1.28 B active (arXiv:2409.02060, table 1: 6.9B and 1.3B)."""
    model = Model(architecture="olmoe", hidden_size=2048, num_layers=16, num_attention_heads=16, expert_size=1024)
    parameters = count(model, Router(num_experts=64, top_k=8), 50304)
    assert parameters.total == pytest.approx(6.92e9, rel=2e-3)
    assert parameters.active == pytest.approx(1.28e9, rel=2e-3)


def test_flops_count_active_experts_and_attention_by_hand() -> None:
    model = Model(hidden_size=8, num_layers=1, num_attention_heads=2, expert_size=4)
    router = Router(num_experts=16, top_k=2)
    matrices = 100 * 8 + 4 * 8 * 8 + 16 * 8 + 2 * 3 * 8 * 4  # head, q k v o, router, two experts
    assert forward_flops_per_token(model, router, 100, 32) == 2 * matrices + 4 * 1 * 8 * 32
    assert training_flops_per_token(model, router, 100, 32) == 3 * (2 * matrices + 4 * 8 * 32)


def test_utilization_is_model_flops_over_the_peak_of_all_ranks() -> None:
    assert model_flops_utilization(1000.0, 6e9, ranks=4, peak_flops_per_rank=5e12) == pytest.approx(0.3)


@pytest.mark.parametrize("size", [1, 2])
def test_adapter_parameters_are_those_that_peft_adds_on_however_many_ranks(root: Path, size: int) -> None:
    from hpc.adapt.lora import attach, trainable_parameters
    from hpc.model.build import build_model, model_config

    parallel = ("ranks_per_node=2", f"expert_parallel_size={size}")
    settings = [f"stages.lora.train.parallel.{setting}" for setting in parallel]
    stage = load_config(root / "configs/quickstart.yaml", settings).stage("lora-modern")
    model, router = Model(hidden_size=64, num_layers=2, num_attention_heads=2, expert_size=32), Router(num_experts=4)
    built = build_model(model_config(model, router, 300, 32, 0), seed=0)
    adapted = attach(built, stage.train, seed=0)
    assert trainable_parameters(adapted, size) == count_adapter(model, router, stage.train)


@pytest.mark.parametrize("query_rank", [16, None])
def test_adapters_on_latent_attention_are_counted_matrix_by_matrix(root: Path, query_rank: int | None) -> None:
    from hpc.adapt.lora import attach, trainable_parameters
    from hpc.model.build import build_model, model_config

    stage = load_config(root / "configs/quickstart.yaml").stage("lora-modern")
    latent = LatentAttention(query_rank=query_rank, kv_rank=8, nope_head_dim=8, rope_head_dim=4, value_head_dim=6)
    model = Model(architecture="deepseek_v3", hidden_size=32, num_layers=3, num_attention_heads=2, expert_size=16,
                  num_dense_layers=1, latent_attention=latent)  # fmt: skip
    router = Router(num_experts=4, num_shared_experts=1)
    adapted = attach(build_model(model_config(model, router, 300, 32, 0), seed=0), stage.train, seed=0)
    assert trainable_parameters(adapted, 1) == count_adapter(model, router, stage.train)
    parts = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in adapted.named_parameters() if ".lora_" in name}
    queries = {"q_a_proj", "q_b_proj"} if query_rank else {"q_proj"}
    assert parts == queries | {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


@pytest.fixture
def quickstart(root: Path) -> RunConfig:
    return load_config(root / "configs/quickstart.yaml")


def test_every_figure_of_a_plan_says_how_it_was_come_by(quickstart: RunConfig) -> None:
    made = plan(quickstart, load_site("local").machine)
    for stage in made.stages:
        for quantity in (stage.memory_per_rank, stage.flops, stage.time, stage.energy):
            assert quantity.how.startswith(("measured:", "derived:", "estimated:", "unknown:"))
            assert (quantity.value is None) == quantity.how.startswith("unknown:")


def test_a_plan_has_every_stage_after_what_it_needs(quickstart: RunConfig) -> None:
    names = [stage.name for stage in plan(quickstart, load_site("local").machine).stages]
    for stage in quickstart.stages:
        assert all(names.index(need) < names.index(stage.name) for need in stage.needs)


def test_expert_parallelism_and_zero_lower_the_memory_of_a_rank(quickstart: RunConfig, root: Path) -> None:
    machine = load_site("local").machine

    def memory(*overrides: str) -> float:
        accumulate = "stages.pretrain.train.batches.tokens_per_step=4096"
        config = load_config(
            root / "configs/quickstart.yaml", [accumulate, *(f"stages.pretrain.train.parallel.{o}" for o in overrides)]
        )
        value = next(s for s in plan(config, machine).stages if s.name == "pretrain").memory_per_rank.value
        assert value is not None
        return value

    together = memory("expert_parallel_size=2")
    assert memory("expert_parallel_size=1") > together
    assert memory("expert_parallel_size=2", "zero_stage=2") < together


def test_groups_that_do_not_divide_the_model_are_refused_with_those_that_do(root: Path, launch: Launch) -> None:
    result = launch(
        "plan", root / "configs/quickstart.yaml", "--set", "stages.pretrain.train.model.expert_size=192",
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == "error: stage 'quantize': group_size 128 does not divide expert_size 192: choose 64 or 32\n"


def test_plan_prints_a_table_and_json(root: Path, launch: Launch) -> None:
    table = launch("plan", "configs/quickstart.yaml").stdout
    assert max(len(line) for line in table.split("\n\n")[1].splitlines()) <= 120
    assert "9.45M" in table
    content = json.loads(launch("plan", "configs/quickstart.yaml", "--json").stdout)
    assert content["stages"][3]["total_params"] == 9_448_192
    assert content["total_energy"]["how"].startswith("estimated:")


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (amount, None, "-"), (amount, 9_448_192, "9.45M"), (amount, 1.2e12, "1.2T"),
        (duration, 9.44, "9.4 s"), (duration, 59.97, "1m00s"), (duration, 7500, "2h05m"), (duration, 3e5, "3d11h"),
        (energy, 14760, "4.1 Wh"), (energy, 8.28e6, "2.3 kWh"), (energy, None, "-"),
    ],
)  # fmt: skip
def test_quantities_read_like_a_person_writes_them(function: Any, value: Any, text: str) -> None:
    assert function(value) == text


def test_shared_experts_of_a_checkpoint_count_in_its_parameters_and_in_its_flops() -> None:
    config = {
        "model_type": "qwen2_moe", "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512, "num_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    plain = shape_of(config)
    shared = shape_of({**config, "shared_expert_intermediate_size": 64})
    assert plain is not None
    assert shared is not None
    matrices = 2 * 3 * 64 * 64
    assert shared[2].total - plain[2].total == matrices
    flops = [training_flops_per_token(model, router, 512, 128) for model, router, *_ in (plain, shared)]
    assert flops[1] - flops[0] == 6 * matrices
