"""Models for laptops as a user meets them: receipt, page and chat of an exported one, and what can go wrong."""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from click.testing import CliRunner
from safetensors.numpy import save_file
from transformers import OlmoeConfig

from hpc.config import Export, Facility, Reuse, Tracking
from hpc.errors import ConfigError
from hpc.run.directory import StageDirectory
from hpc.run.task import Context, TaskFile, World
from hpc.runtimes.artifact import locate
from hpc.stages import export
from launch import main
from tests.chain.test_interruption import family, start
from tests.chain.test_quickstart import receipt
from tests.conftest import Launch, quickstart_command
from tests.data.preparation import MACHINE

EXPORTED = "gguf-q4_k_m"


def told(*words: object) -> tuple[int, str]:
    """Exit code and what `launch.py` writes to stderr, one line."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.exit_code, result.stderr


def test_the_receipt_of_an_export_says_what_it_costs_and_what_was_seen(quickstart: Path) -> None:
    four = receipt(quickstart, EXPORTED)
    metrics, provenance = four["metrics"], four["provenance"]
    assert metrics["runtime"] == "llama.cpp"
    assert metrics["kl"] < 0.05
    assert metrics["conversion_kl"] < 1e-4
    assert 0.98 < metrics["perplexity_ratio"] < 1.02
    assert metrics["top1_agreement"] > 0.9
    assert 4.5 <= metrics["expert_bits_per_weight"] < 5.2
    assert 8 * metrics["artifact_bytes"] > metrics["bits_per_weight"] * 4 * 8 * 3 * 256 * 256
    for name in ("tokens_per_s", "prompt_tokens_per_s", "load_seconds", "memory_bytes", "bits_per_byte"):
        assert metrics[name] > 0, name
        assert provenance[name].startswith("measured: ")
    assert "held-out ids" in provenance["kl"]
    assert metrics["texts"][0]["artifact"].strip()
    assert four["census"]["experts"]["parameters"] == 4 * 8 * 3 * 256 * 256
    assert [file["path"] for file in four["files"]] == ["model-q4_k_m.gguf"]
    assert not [path.name for path in (quickstart / "stages" / EXPORTED).iterdir() if path.name.startswith(".scr")]


def test_evaluation_runs_it_in_llama_cpp_and_the_page_shows_it(quickstart: Path) -> None:
    metrics = receipt(quickstart, "evaluate")["metrics"]
    losses = [metrics["models"][name]["text-modern"]["loss"] for name in (EXPORTED, "merge-modern")]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    assert metrics["runtimes"][EXPORTED]["runtime"] == "llama.cpp"
    for name in (EXPORTED, "quantize", "merge-modern"):
        assert metrics["runtimes"][name]["tokens_per_s"] > 0
        assert metrics["runtimes"][name]["j_per_token"] > 0
    page = (quickstart / "report.html").read_text()
    shrunken = page.split("<h2>Shrunken models</h2>")[1].split("</section>")[0]
    for words in ("<td>quantize</td>", f"<td>{EXPORTED}</td>", "llama.cpp"):
        assert words in shrunken


def test_chat_answers_from_the_stage(quickstart: Path, launch: Launch) -> None:
    words = ("--prompt", "The people of", "--max-tokens", "8", "--temperature", "0")
    answers = [launch("chat", quickstart / "stages" / EXPORTED, *words) for _ in range(2)]
    assert [answer.returncode for answer in answers] == [0, 0], answers[0].stderr
    assert answers[0].stdout == answers[1].stdout != "\n"
    assert "[8 tokens, " in answers[0].stderr


def test_a_finished_file_that_is_damaged_is_refused_by_what_reads_it(quickstart: Path, tmp_path: Path) -> None:
    shutil.copytree(quickstart, tmp_path / "quickstart", ignore=shutil.ignore_patterns("wandb", "jobs"))
    path = tmp_path / "quickstart/stages" / EXPORTED / "artifact/model-q4_k_m.gguf"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    code, text = told("run", *quickstart_command(tmp_path))
    assert (code, f"{path} is damaged" in text) == (4, True), text


def context_of(run: Path, **settings: Any) -> Context:
    """Of an export stage `laptop` that needs a stage `model`."""
    stages = [
        Reuse.model_validate({"kind": "reuse", "name": "model", "init": {"from": "somewhere"}}),
        Export.model_validate({"kind": "export", "name": "laptop", "needs": ["model"], **settings}),
    ]
    (run / "stages/laptop").mkdir(parents=True, exist_ok=True)
    task = TaskFile(
        run="run", run_directory=str(run), stage=stages[1], stages=stages, inputs={}, seed=0, tracking=Tracking(),
        machine=MACHINE, facility=Facility(), ranks=1, nodes=1,
    )  # fmt: skip
    return Context(task, StageDirectory(run / "stages/laptop"), World(), attempt=1)


def test_what_cannot_become_a_file_is_refused_at_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OlmoeConfig(num_attention_heads=4, num_key_value_heads=2).save_pretrained(tmp_path / "stages/model/artifact")
    for left in (".scratch/plain.gguf", ".artifact/model.gguf"):  # by an attempt that was killed
        (tmp_path / "stages/laptop" / left).mkdir(parents=True)
    with pytest.raises(ConfigError, match="as many key and value heads as attention heads, this has 2 for 4: train"):
        export.run(context_of(tmp_path, format="gguf-q8_0"))
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(ConfigError, match=r"^MLX folders need mlx_lm, which is not installed: pip install"):
        export.run(context_of(tmp_path, format="mlx-4bit"))
    assert [path.name for path in (tmp_path / "stages/laptop").iterdir()] == ["progress.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "gguf-q9"}, "stages[3].format: 'gguf-q9': input should be"),
        ({"needs": ["adapter"]}, "'laptop' (export) needs a stage that produces model"),
        ({"group_size": 48}, "group_size"),
        ({"gate": "model.kl <"}, "is not of the form"),
    ],
)
def test_a_chain_with_an_export_that_cannot_be_is_refused_when_it_is_loaded(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    stages: list[dict[str, Any]] = [
        {"name": "model", "kind": "reuse", "init": {"from": str(tmp_path)}},
        {"name": "text", "kind": "prepare", "needs": ["model"], "sources": [{"files": ["*.txt"]}]},
        {"name": "adapter", "kind": "lora", "needs": ["model", "text"], "train": {
            "batches": {"seq_len": 64, "micro_batch_size": 2, "tokens_per_step": 512}, "steps": 8, "rank": 4,
            "alpha": 8, "optimizer": {"lr": 2e-3}}},
        {"name": "laptop", "kind": "export", "needs": ["model"], **change},
    ]  # fmt: skip
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x", "run_root": str(tmp_path), "stages": stages}))
    code, text = told("plan", tmp_path / "x.yaml")
    assert (code, words in text) == (2, True), text


def test_chat_says_what_it_cannot_talk_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lora/adapter_config.json", "mlx/config.json", "begun/task.json", "cut/config.json", "cut.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    save_file({"w": np.zeros(1)}, tmp_path / "mlx/model.safetensors", {"format": "mlx"})
    (tmp_path / "cut/model.safetensors").write_bytes(b"")
    assert locate(tmp_path / "cut")[0] == "transformers", "whose own words about the file are told"
    (tmp_path / "mlx_lm.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mlx'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for place, code, words in (
        ("nowhere", 3, "is neither a .gguf file nor a folder: name a model folder, or RUN/stages/STAGE"),
        ("begun", 3, "holds no model (no config.json, no .gguf)"),
        ("lora", 3, "merge it and name the merged model"),
        ("cut.gguf", 4, "llama.cpp does not load"),
        ("mlx", 2, "MLX folders need mlx, which is not installed: pip install"),
    ):
        found, text = told("chat", tmp_path / place, "--prompt", "Hi")
        assert (found, words in text) == (code, True), text


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_an_export_leaves_no_process_and_nothing_half_made(
    tiny_model: Path, tmp_path: Path
) -> None:
    stages = [
        {"name": "model", "kind": "reuse", "init": {"from": str(tiny_model)}},
        {"name": "laptop", "kind": "export", "needs": ["model"], "format": "gguf-q8_0"},
    ]
    config = {"name": "x", "tracking": {"wandb": "disabled"}, "stages": stages}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    process = start(tmp_path / "x.yaml")
    deadline = time.monotonic() + 300
    while not is_serving(process):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = family(process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.count("\n") == 1
    assert psutil.wait_procs(children, timeout=10)[1] == []
    left = {path.name for path in (tmp_path / "x/stages/laptop").iterdir()}
    assert not left & {"artifact", "receipt.json"}
    assert not [name for name in left if name.startswith((".artifact", ".scratch"))]


def is_serving(process: Any) -> bool:
    """Whether a runtime has an artifact open."""
    for child in family(process):
        with suppress(psutil.Error):  # gone meanwhile
            if "hpc.runtimes.serve" in child.cmdline():
                return True
    return False
