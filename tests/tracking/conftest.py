"""A W&B server on this machine, trainers that can be killed, and what W&B's files hold, read by W&B's own reader."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpc.bench.wandb_server import Server
from hpc.run.directory import read_jsonl
from tests.conftest import ROOT

os.environ["WANDB__FILE_STREAM_TRANSMIT_INTERVAL"] = "1"  # of the tests' patience; 15 s otherwise

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def server() -> Iterator[Server]:
    """In good health, and empty."""
    with Server() as made:
        yield made


@pytest.fixture
def start() -> Iterator[Start]:
    """Start an attempt (tests/tracking/trainer.py) in a process of its own; ended with its mirror after the test."""
    started = []

    def call(
        root: Path, first: int, last: int, then: str, mode: str = "offline", *, patience: float = 60.0, **variables: str
    ) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.tracking.trainer", *map(str, (root, first, last, then, mode, patience))]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield call
    for process in started:
        kill_node(process)


def kill_node(process: "subprocess.Popen[str]") -> None:
    """What a power failure does: trainer, mirror and W&B's own process end at once."""
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        for each in (*family, process):
            each.kill()
        psutil.wait_procs(family, 5)
    process.wait()


def wait(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What `what` returns once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    pytest.fail("it did not happen in time")


Records = dict[str, list[dict[str, Any]]]


def records(root: Path) -> Records:
    """Records of all fragments of a stage by kind, the oldest fragment first."""
    found: Records = {}
    for folder in sorted((root / "wandb").glob("*run-2*"), key=lambda path: path.name.removeprefix("offline-")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        for record in map(json.loads, result.stdout.splitlines()):
            found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def bytes_on_disk(root: Path) -> int:
    """Of all fragments of a stage."""
    return sum(path.stat().st_size for path in (root / "wandb").glob("*run-2*/*.wandb"))


def history(found: Records) -> list[dict[str, Any]]:
    """Rows in all fragments, without what W&B adds."""
    items = [record["item"] for record in found.get("history", [])]
    return [{key: value for key, value in item.items() if key != "_runtime"} for item in items]


def expected(root: Path) -> list[dict[str, Any]]:
    """The rows that metrics.jsonl of a `trainer` should give, written down a second time and plainly."""
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(read_jsonl(root / "metrics.jsonl")):
        told = {"_step": number, "_timestamp": row["time"], "step": row["step"], "tokens": row["tokens"],
                "attempt": row["attempt"], "time": row["time"], "tokens_per_s": row["tokens_per_s"],
                "node_power_w/n1": 100.0, "node_power_w/n2": 200.5, "energy_j": row["energy_j"],
                "energy_kwh": row["energy_j"] / 1000 / 3600}  # fmt: skip
        if row["tokens"]:
            told["j_per_token"] = row["energy_j"] / row["tokens"]
        if any(earlier["step"] == row["step"] for earlier in rows):
            told["replayed"] = 1
        else:
            told |= {"loss": row["loss"], "router_load/layer_0/expert_0": 0.25, "router_load/layer_0/expert_1": 0.75,
                     "router_load/layer_1/expert_0": 0.5, "router_load/layer_1/expert_1": 0.5,
                     "router_entropy/layer_0": 0.75, "router_entropy/layer_1": 1.0}  # fmt: skip
        rows.append(told)
    return rows


def streamed(server: Server, run: str) -> list[dict[str, Any]]:
    """Rows that the server holds, without what W&B adds."""
    return [{key: value for key, value in row.items() if key != "_runtime"} for row in server.runs[run].history]


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Row for row; figures to the twelve digits that survive."""
    assert [row["_step"] for row in found] == [row["_step"] for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert row == pytest.approx(other, rel=1e-12)


def at(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it the W&B server of this process and of those it starts."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
