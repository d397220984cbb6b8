"""Shared by all tests: thread bounds, and a way to call `launch.py` as a user does."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("WANDB_API_KEY", None)

ROOT = Path(__file__).resolve().parent.parent

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Run `python launch.py ARGUMENTS` and return what it printed and its exit code."""

    def call(*arguments: object, timeout: float = 600, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd)

    return call


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral with a tokenizer and a chat template, as a transformers folder."""
    from tests.shrink import tiny

    return tiny.save(tiny.tiny_model("mixtral"), tmp_path_factory.mktemp("mixtral") / "tiny")


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Path:
    """Run directory of the shipped quickstart with fewer steps and tokens: every stage kind, for real."""
    folder = tmp_path_factory.mktemp("quickstart")
    result = launch("run", *quickstart_command(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"report: {folder / 'quickstart' / 'report.html'}" in result.stdout
    return folder / "quickstart"


def quickstart_command(folder: Path, *more: str) -> list[str]:
    """What to run or submit: the main job, shortened."""
    overrides = [
        f"run_root={folder}",
        "stages.pretrain.train.steps=60",
        "stages.pretrain.train.batches.tokens_per_step=2048",
        "stages.pretrain.train.evaluate_tokens=2048",
        "stages.lora.train.steps=12",
        "stages.evaluate.tokens=4096",
        "stages.evaluate.generate_tokens=12",
        "stages.evaluate.timed_seconds=0.2",
        "stages.gguf.matrix.type=[q4_k_m]",
        *more,
    ]
    return ["configs/quickstart.yaml", *(word for override in overrides for word in ("--set", override))]
