"""Rehearsals: a twin keeps what code branches on, its table is whole, and it runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpc.config import Reuse, RunConfig, Trains
from hpc.config.load import load_config
from hpc.config.model import Router
from hpc.plan.hub import hub_config
from hpc.plan.reused import shape_of
from hpc.rehearse import sizes
from hpc.rehearse.sizes import Room
from hpc.rehearse.twin import Twin, twin
from tests.conftest import ROOT, Launch

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
LARGE = ("pretrain-olmoe-1b-7b", "relora-olmoe", "upcycle-qwen3", "reuse-mixtral-8x7b")
MAY_DIFFER = {
    "": {"name", "tracking.wandb"},
    "prepare": {"sources", "held_out_fraction", "tokenizer", "tokenizer.vocab_size", "tokenizer.path"},
    "reuse": {"init.from", "init.revision", "init.sha256", "upcycle.num_experts"},
    "quantize": {
        "group_size", "calibration.tokens", "calibration.max_tokens", "calibration.seq_len", "calibration.iterations",
        "calibration.batch_size",
    },
    "evaluate": {"tokens", "seq_len", "generate_tokens"},
    "train": {
        "model.hidden_size", "model.num_layers", "model.num_attention_heads", "model.num_key_value_heads",
        "model.expert_size", "router.num_experts", "batches.seq_len", "batches.micro_batch_size",
        "batches.tokens_per_step", "steps", "schedule.warmup_steps", "schedule.restart_every_steps",
        "schedule.restart_warmup_steps", "parallel.nodes", "parallel.ranks_per_node", "parallel.expert_parallel_size",
        "checkpoint_every_steps", "keep_every_steps", "evaluate_every_steps", "evaluate_tokens", "rank", "alpha",
    },
}  # fmt: skip
"""Kind of stage -> what a rehearsal may cut; gates and resources belong to all."""


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}.{key}".lstrip(".")).items()}
    return {path: value}


def differing(recipe: RunConfig, found: Twin) -> set[tuple[str, str]]:
    """(stage, key) of all that is not the same, found in another way than the table is."""
    before, after = recipe.model_dump(mode="json"), found.config.model_dump(mode="json")
    pairs = [("", before | {"stages": None}, after | {"stages": None})]
    pairs += [(one["name"], one, other) for one, other in zip(before["stages"], after["stages"], strict=True)]
    told = set()
    for stage, one, other in pairs:
        first, second = flat(one), flat(other)
        told |= {(stage, key) for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    return told


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_twin_has_the_same_stages_and_differs_only_in_sizes_all_of_them_in_the_table(path: Path) -> None:
    recipe = load_config(path)
    found = twin(recipe, Room(1, 2), "cpu")
    assert [(s.name, s.kind, s.needs) for s in found.config.stages] == [
        (s.name, s.kind, s.needs) for s in recipe.stages
    ]
    listed = {(cut.stage, cut.setting) for cut in found.cuts}
    for stage, key in differing(recipe, found):
        assert any(stage == where and (key == what or key.startswith(f"{what}.")) for where, what in listed), key
        kind = recipe.stage(stage).kind if stage else ""
        allowed = MAY_DIFFER["train"] if key.startswith("train.") else MAY_DIFFER.get(kind, set())
        general = key == "gate" or key.startswith("resources.")
        assert general or key.removeprefix("train.") in allowed, f"{stage}: {key}"


@pytest.mark.parametrize("name", LARGE)
def test_large_recipes_keep_expert_parallelism_and_fit_two_processes(name: str) -> None:
    recipe = load_config(ROOT / f"configs/{name}.yaml")
    for stage, original in zip(twin(recipe, Room(1, 2), "cpu").config.stages, recipe.stages, strict=True):
        if isinstance(stage, Trains) and isinstance(original, Trains):
            assert stage.train.parallel.world_size == stage.train.parallel.expert_parallel_size == 2
            assert stage.train.parallel.zero_stage == original.train.parallel.zero_stage
            assert (stage.train.gradient_accumulation_steps > 1) == (original.train.gradient_accumulation_steps > 1)


def test_one_core_rehearses_without_other_ranks_and_a_cluster_over_two_nodes() -> None:
    recipe = load_config(ROOT / "configs/relora-olmoe.yaml")
    alone = twin(recipe, Room(1, 1), "cpu").config.stage("relora")
    nodes = twin(recipe, Room(2, 2), "cpu").config.stage("relora")
    assert isinstance(alone, Trains)
    assert isinstance(nodes, Trains)
    assert (alone.train.parallel.world_size, alone.train.parallel.expert_parallel_size) == (1, 1)
    assert (nodes.train.parallel.nodes, nodes.train.parallel.ranks_per_node) == (2, 1)
    assert nodes.train.parallel.expert_parallel_size == 2
    schedule = nodes.train.schedule
    assert schedule.restart_every_steps
    assert nodes.train.steps == 2 * schedule.restart_every_steps  # one real restart


def test_a_recipe_for_one_node_stays_on_one_node_of_a_cluster_with_its_experts_on_two_ranks() -> None:
    lora = twin(load_config(ROOT / "configs/reuse-mixtral-8x7b.yaml"), Room(2, 2), "cpu").config.stage("lora")
    assert isinstance(lora, Trains)
    parallel = lora.train.parallel
    assert (parallel.nodes, parallel.ranks_per_node, parallel.expert_parallel_size) == (1, 2, 2)


def test_without_a_cluster_nothing_is_made(tmp_path: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    recipe, root = "configs/reuse-mixtral-8x7b.yaml", f"run_root={tmp_path}/runs"
    result = launch("rehearse", recipe, "--site", "devcluster", "--set", root)
    assert result.returncode == 8
    assert result.stderr.count("\n") == 1
    assert "devcluster up" in result.stderr
    assert not list(tmp_path.iterdir())


@given(experts=st.integers(1, 512), data=st.data())
def test_fewer_experts_still_make_a_router(experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, min(experts, 16)))
    few = sizes.num_experts(experts, top_k)
    assert top_k <= few <= experts
    assert few == experts or few % 2 == 0


def test_fewer_experts_still_make_the_groups_of_deepseek() -> None:
    few = sizes.num_experts(256, 8, 8, 4)
    assert few == 16
    Router(num_experts=few, top_k=8, num_groups=8, top_groups=4)


@given(kv_heads=st.integers(1, 64), ratio=st.integers(1, 16), head_dim=st.sampled_from([64, 128]))
def test_fewer_heads_share_keys_as_before(kv_heads: int, ratio: int, head_dim: int) -> None:
    hidden, heads, few_kv = sizes.attention(kv_heads * ratio * head_dim, kv_heads * ratio, kv_heads)
    assert heads == ratio * few_kv
    assert hidden == heads * sizes.HEAD_DIM


def test_the_catalogue_knows_the_models_that_recipes_start_from() -> None:
    published = {  # as their papers and cards round it
        "mistralai/Mixtral-8x7B-v0.1": 46.7e9,
        "allenai/OLMoE-1B-7B-0924": 6.9e9,
        "Qwen/Qwen3-1.7B-Base": 1.7e9,
    }
    for source, parameters in published.items():
        shape = shape_of(hub_config(source) or {})
        assert shape is not None
        assert shape[2].total == pytest.approx(parameters, rel=0.015)
    assert hub_config("someone/Model-7B") is None


@pytest.mark.parametrize("name", LARGE)
def test_large_recipes_plan_on_a_site_without_their_models(name: str, launch: Launch) -> None:
    result = launch("plan", f"configs/{name}.yaml", "--site", "jupiter-booster", "--json")
    assert result.returncode == 0, result.stderr
    starts = [stage.name for stage in load_config(ROOT / f"configs/{name}.yaml").stages
              if isinstance(stage, Reuse) and stage.init]  # fmt: skip
    told = {stage["name"]: stage for stage in json.loads(result.stdout)["stages"]}
    assert all("shape from the catalogue" in told[stage]["notes"][0] for stage in starts)


def test_a_model_that_nobody_knows_is_refused_in_one_line(tmp_path: Path, launch: Launch) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nstages: [{name: a, kind: reuse, init: {from: someone/unheard}}]\n")
    result = launch("rehearse", path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "someone/unheard" in result.stderr


def test_a_dry_run_tells_and_makes_nothing(tmp_path: Path, launch: Launch) -> None:
    result = launch("rehearse", "configs/reuse-mixtral-8x7b.yaml", "--set", f"run_root={tmp_path}", "--dry-run")
    assert result.returncode == 0, result.stderr
    table, text = result.stdout.split("\n\nname: ")
    assert "init.from: num_local_experts" in table
    assert "14,336" in table
    assert RunConfig.model_validate(yaml.safe_load("name: " + text)).name == "reuse-mixtral-8x7b-rehearsal"
    assert not list(tmp_path.iterdir())


def test_adapters_of_mixtral_are_rehearsed_on_a_model_of_its_kind(tmp_path: Path, launch: Launch) -> None:
    recipe = yaml.safe_load((ROOT / "configs/reuse-mixtral-8x7b.yaml").read_text())
    recipe |= {"name": "mix", "run_root": str(tmp_path), "tracking": {"wandb": "disabled"}}
    recipe["stages"] = recipe["stages"][:3]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(recipe))
    result = launch("rehearse", tmp_path / "mix.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "mix-rehearsal"
    config = json.loads((run / "stages/mixtral/artifact/config.json").read_text())
    assert (config["model_type"], config["num_experts_per_tok"]) == ("mixtral", 2)
    assert config["num_attention_heads"] == 4 * config["num_key_value_heads"]
    metrics = json.loads((run / "stages/lora/receipt.json").read_text())["metrics"]
    assert metrics["heldout_loss"] < metrics["heldout_loss_before"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_is_rehearsed_to_its_report(name: str, tmp_path: Path, launch: Launch) -> None:
    result = launch("rehearse", f"configs/{name}.yaml", "--set", f"run_root={tmp_path}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / f"{name}-rehearsal" / "report.html").is_file()
