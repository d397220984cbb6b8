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
