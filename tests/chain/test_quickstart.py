"""The main job, shortened: what each stage leaves behind, what a second launch does, what damage does."""

import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Launch, quickstart_command

FRESH_LOSS = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = numpy.fromfile(sys.argv[2], dtype=numpy.uint16).astype(numpy.int64)
total, count, width = 0.0, 0, model.config.max_position_embeddings
starts = numpy.append(0, numpy.flatnonzero(tokens == tokens[-1]) + 1)  # documents end with the last token's id
windows = (len(tokens) - 1) // width
for first in range(0, windows, 16):
    rows = [tokens[w * width : w * width + width + 1] for w in range(first, min(first + 16, windows))]
    ids = torch.tensor(numpy.stack(rows))
    places = numpy.arange(first * width, (first + len(rows)) * width).reshape(len(rows), width)
    documents = starts[numpy.searchsorted(starts, places, side="right") - 1]
    positions = torch.tensor(places - numpy.maximum(documents, places[:, :1]))
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1], position_ids=positions, use_cache=False).logits
    total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    count += ids[:, 1:].numel()
print(total / count)
"""
"""Only transformers and plain torch: nothing of ours reads the model or the tokens."""

EXPORTS = ("gguf-q4_k_m",)


def receipt(run: Path, stage: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "stages" / stage / "receipt.json").read_text())
    return content


def test_pretraining_beats_the_unigram_model(quickstart: Path) -> None:
    unigram = receipt(quickstart, "text")["metrics"]["unigram_perplexity"]
    assert receipt(quickstart, "pretrain")["metrics"]["heldout_perplexity"] < 0.75 * unigram


def test_a_fresh_process_with_plain_transformers_finds_the_same_held_out_loss(quickstart: Path) -> None:
    model = quickstart / "stages/pretrain/artifact"
    tokens = quickstart / "stages/text/artifact/held_out.bin"
    command = [sys.executable, "-c", FRESH_LOSS, str(model), str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    loss = receipt(quickstart, "pretrain")["metrics"]["heldout_loss"]
    assert float(result.stdout) == pytest.approx(loss, abs=1e-4)


def test_every_tensor_of_the_model_is_accounted_for(quickstart: Path) -> None:
    groups = receipt(quickstart, "pretrain")["census"]
    assert sorted(groups["experts"].pop("xxh3_64_by_layer")) == ["0", "1", "2", "3"]
    assert groups["experts"] == {"tensors": 8, "parameters": 4 * 8 * 3 * 256 * 256}
    total = sum(group["parameters"] for group in groups.values())
    assert total == receipt(quickstart, "pretrain")["metrics"]["total_params"]


def test_adapters_lower_the_held_out_loss_of_their_task(quickstart: Path) -> None:
    table = receipt(quickstart, "evaluate")["metrics"]["models"]
    assert table["merge-modern"]["text-modern"]["loss"] < table["pretrain"]["text-modern"]["loss"]
    assert table["merge-python"]["text-python"]["loss"] < table["pretrain"]["text-python"]["loss"]


def test_a_merged_model_is_its_base_with_the_adapter(quickstart: Path) -> None:
    for stage in ("merge-modern", "merge-python"):
        assert receipt(quickstart, stage)["metrics"]["max_relative_logit_difference"] < 1e-5


def test_quantization_packs_every_expert_and_costs_little(quickstart: Path) -> None:
    metrics, census = receipt(quickstart, "quantize")["metrics"], receipt(quickstart, "quantize")["census"]
    assert census["experts"]["packed_tensors"] == 4 * 8 * 3
    assert metrics["expert_bits_per_weight"] < 4.3
    table = receipt(quickstart, "evaluate")["metrics"]["models"]
    loss = {name: table[name]["text-modern"]["loss"] for name in ("merge-modern", "quantize")}
    assert math.exp(loss["quantize"] - loss["merge-modern"]) < 1.05


def test_every_model_wrote_text_from_every_prompt(quickstart: Path) -> None:
    samples = receipt(quickstart, "evaluate")["metrics"]["samples"]
    assert set(samples) == {"pretrain", "merge-modern", "merge-python", "quantize", "gguf-q4_k_m"}
    for texts in samples.values():
        assert all(len(sample["text"]) > len(sample["prompt"]) for sample in texts)


def test_every_stage_has_joules_with_their_provenance(quickstart: Path) -> None:
    for path in (quickstart / "stages").iterdir():
        energy = receipt(quickstart, path.name)["energy"]
        assert energy["energy_j"] > 0, path.name
        assert all(source.startswith(("measured:", "estimated:")) for source in energy["provenance"])


def test_every_metric_says_where_it_comes_from(quickstart: Path) -> None:
    for path in (quickstart / "stages").iterdir():
        content = receipt(quickstart, path.name)
        assert set(content["metrics"]) == set(content["provenance"]), path.name
        assert all(v.startswith(("measured:", "derived:", "estimated:")) for v in content["provenance"].values())


def test_metrics_rows_carry_loss_speed_routing_and_energy(quickstart: Path) -> None:
    lines = (quickstart / "stages/pretrain/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    row = next(row for row in rows if row["step"] == 30)
    assert row["tokens"] == 30 * 2048
    assert row["energy_j"] > 0
    assert len(row["router_load"]) == 4
    for layer in row["router_load"]:
        assert len(layer) == 8
        assert sum(layer) == pytest.approx(1, abs=1e-3)


def test_the_report_stage_leaves_a_page_and_a_card_of_every_model(quickstart: Path) -> None:
    artifact = quickstart / "stages/report/artifact"
    assert (quickstart / "report.html").read_bytes() == (artifact / "report.html").read_bytes()
    cards = {path.parent.name for path in artifact.glob("cards/*/README.md")}
    assert cards == {"pretrain", "lora-modern", "lora-python", "merge-modern", "merge-python", "quantize", *EXPORTS}
    assert "11 of 11 stages are done" in (quickstart / "report.html").read_text()
    assert receipt(quickstart, "report")["metrics"]["cards"] == 7


def test_a_second_launch_reuses_everything(quickstart: Path, launch: Launch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (quickstart / "stages").glob("*/receipt.json")}
    result = launch("run", *quickstart_command(quickstart.parent))
    assert result.returncode == 0
    assert result.stdout.count("reused") == 12
    assert before == {path: path.stat().st_mtime_ns for path in (quickstart / "stages").glob("*/receipt.json")}


def test_a_damaged_byte_is_refused_by_the_name_of_its_file(quickstart: Path, launch: Launch) -> None:
    path = quickstart / "stages/merge-modern/artifact/model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    try:
        result = launch("run", *quickstart_command(quickstart.parent))
    finally:
        path.write_bytes(whole)
    assert result.returncode == 4
    assert result.stderr.startswith(f"error: {path} is damaged")
    assert result.stderr.count("\n") == 1


def test_the_stage_that_reads_a_damaged_file_refuses_it_too(quickstart: Path, tmp_path: Path) -> None:
    from hpc.errors import ArtifactError
    from hpc.run.directory import StageDirectory
    from hpc.run.task import Context, TaskFile, World

    copy = tmp_path / "quickstart"
    shutil.copytree(quickstart, copy, ignore=shutil.ignore_patterns("wandb", "jobs"))
    damaged = copy / "stages/text-modern/artifact/held_out.bin"
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    task = TaskFile.read(copy / "stages/evaluate/task.json").model_copy(update={"run_directory": str(copy)})
    context = Context(task, StageDirectory(copy / "stages/evaluate"), World(), attempt=2)
    with pytest.raises(ArtifactError, match=r"held_out\.bin is damaged"):
        context.verify_inputs()


def test_a_changed_setting_runs_what_depends_on_it_again_and_says_why(quickstart: Path, launch: Launch) -> None:
    copy = quickstart.parent / "changed" / "quickstart"
    shutil.copytree(quickstart, copy, ignore=shutil.ignore_patterns("wandb"))
    result = launch("run", *quickstart_command(copy.parent, "stages.quantize.group_size=64"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("reused") == 9
    assert "quantize: again: group_size changed from 128 to 64" in result.stdout
    assert "evaluate: again: its input quantize changed" in result.stdout
    assert "report: again: its input" in result.stdout
    assert (copy / "superseded/quantize-1/receipt.json").exists()


def test_wandb_holds_loss_rate_speed_routing_watts_and_joules(quickstart: Path) -> None:
    folder = next((quickstart / "stages/pretrain/wandb").glob("offline-run-*"))
    history = leet(folder)
    row = next(row for row in history if row.get("step") == 30)
    logged = (quickstart / "stages/pretrain/metrics.jsonl").read_text().splitlines()
    truth = next(row for row in map(json.loads, logged) if row["step"] == 30)
    for key in ("loss", "lr", "tokens_per_s", "energy_j", "grad_norm"):
        assert row[key] == pytest.approx(truth[key]), key
    assert row["router_load/layer_0/expert_0"] == pytest.approx(truth["router_load"][0][0])
    host, watts = next(iter(truth["node_power_w"].items()))
    assert row[f"node_power_w/{host}"] == pytest.approx(watts)
    assert row[f"node_energy_j/{host}"] == pytest.approx(truth["node_energy_j"][host])
    assert row["router_entropy/layer_3"] == pytest.approx(truth["router_entropy"][3])
    assert [item["_step"] for item in history] == list(range(len(logged)))


def test_wandb_knows_what_a_stage_was_made_from(quickstart: Path) -> None:
    def run_of(stage: str) -> Any:
        return wandb_records(next((quickstart / "stages" / stage / "wandb").glob("offline-run-*")), "run")[0]["run"]

    config = run_of("merge-modern")["config"]["update"]
    pretrain = config["lineage"]["pretrain"]
    assert pretrain["wandb_run"] == run_of("pretrain")["run_id"]
    assert pretrain["digest"] == receipt(quickstart, "merge-modern")["inputs"]["pretrain"]
    assert config["stage"]["kind"] == "merge"


def test_every_stage_has_one_wandb_run_in_the_group_of_the_chain(quickstart: Path) -> None:
    def named(stage: Path) -> tuple[str, str]:
        (folder,) = (stage / "wandb").glob("offline-run-*")
        summary = wandb_records(folder, "run")[0]["run"]
        return summary["run_group"], summary["display_name"]

    stages = list((quickstart / "stages").iterdir())
    with ThreadPoolExecutor(2) as pool:  # W&B's tool starts a process for each
        found = list(pool.map(named, stages))
    assert found == [("quickstart", f"quickstart/{path.name}") for path in stages]


def leet(folder: Path) -> list[dict[str, Any]]:
    """Rows that were logged."""
    return [record["history"]["item"] for record in wandb_records(folder, "history")]


def wandb_records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one type in a W&B run file, read back by W&B's own tool."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    return [record for record in records if record["type"] == kind]
