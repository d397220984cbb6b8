"""The sampler as a real process on a fake Cray node: what it must outlive, and what may not be counted twice."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpc.bench.fake_node import cray
from hpc.energy.ledger import power_series
from hpc.energy.sampler import shared_with
from hpc.run.directory import read_jsonl
from tests.conftest import ROOT

Start = Callable[..., "subprocess.Popen[bytes]"]


class Node:
    """A node whose meter is fed by hand."""

    def __init__(self, root: Path) -> None:
        self.root, self.joules, self.refreshes = root, 1000, 0
        self.feed(0)

    def feed(self, joules: int) -> None:
        self.joules += joules
        self.refreshes += 1
        cray(self.root, self.joules, freshness=self.refreshes, inside={"cpu": self.joules // 2})


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "root")


@pytest.fixture
def start(tmp_path: Path, node: Node) -> Iterator[Start]:
    """Start a sampler of node n1, twenty samples a second, in folder `stage`."""
    running: list[subprocess.Popen[bytes]] = []

    def start(
        stage: str = "stage", attempt: int = 1, watch: int | None = None, is_old_kernel: bool = False
    ) -> "subprocess.Popen[bytes]":
        (tmp_path / stage).mkdir(exist_ok=True)
        without = "import os; del os.pidfd_open; from hpc.energy.sampler import main; main()"
        run = ["-c", without] if is_old_kernel else ["-m", "hpc.energy.sampler"]
        command = [sys.executable, *run, "--out", tmp_path / stage, "--node", "n1", "--interval",
                   "0.05", "--watch-pid", watch or os.getpid(), "--attempt", attempt, "--root", node.root]  # fmt: skip
        running.append(subprocess.Popen([str(word) for word in command], cwd=ROOT, start_new_session=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    return lambda stage="stage": read_jsonl(tmp_path / stage / "energy-n1.jsonl")


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def shows(rows: Callable[..., list[dict[str, Any]]], joules: float, stage: str = "stage") -> Callable[[], bool]:
    """Whether a row with this total is there."""
    return lambda: any(row.get("total_energy_j") == joules for row in rows(stage))


def test_every_fed_joule_is_in_the_last_row_and_parts_are_detail(start: Start, node: Node, rows: Any) -> None:
    sampler = start()
    until(shows(rows, 0))
    for _ in range(5):
        node.feed(70)
    sampler.send_signal(signal.SIGINT)
    sampler.wait(5)
    first, *_, last = rows()
    assert (first["event"], first["pid"], first["unmeasured"]) == ("start", sampler.pid, [])
    assert (last["event"], last["total_energy_j"], last["total_power_w"]) == ("end", 350, 300)
    assert last["detail_j"] == {"pm_counters cpu_energy": 175}
    assert not {"gap_s", "share", "unsure_j", "stale_s"} & last.keys(), "nothing to say, nothing said"


@pytest.mark.parametrize("is_old_kernel", [False, True])
def test_a_stopped_trainer_is_sampled_on_and_a_killed_one_ends_the_sampler_at_once(
    start: Start, node: Node, rows: Any, is_old_kernel: bool
) -> None:
    """Before Linux 5.3 there is no handle on a process that wakes; it is looked at instead."""
    trainer = subprocess.Popen(["sleep", "60"])
    try:
        sampler = start(watch=trainer.pid, is_old_kernel=is_old_kernel)
        until(shows(rows, 0))
        trainer.send_signal(signal.SIGSTOP)
        node.feed(100)
        until(shows(rows, 100))
        trainer.send_signal(signal.SIGKILL)  # and nobody collects it yet: a zombie counts as gone
        sampler.wait(5)
    finally:
        trainer.kill()
        trainer.wait()
    assert rows()[-1]["event"] == "end"


def test_slurms_sigterm_to_the_whole_job_does_not_end_it_while_the_trainer_saves(
    start: Start, node: Node, rows: Any
) -> None:
    sampler = start()
    until(shows(rows, 0))
    sampler.send_signal(signal.SIGTERM)
    node.feed(100)
    until(shows(rows, 100))
    assert sampler.poll() is None


def test_a_second_sampler_of_the_same_attempt_goes_away(start: Start, rows: Any) -> None:
    first = start()
    until(shows(rows, 0))
    assert start().wait(20) == 0
    assert first.poll() is None
    assert [row["pid"] for row in rows() if row["event"] == "start"] == [first.pid]


def test_a_newer_attempt_takes_over_from_a_sampler_that_hangs(start: Start, node: Node, rows: Any) -> None:
    old = start(attempt=1)
    until(shows(rows, 0))
    old.send_signal(signal.SIGSTOP)  # as in a system call on a dead file system: it cannot obey
    new = start(attempt=2)
    until(lambda: any(row["attempt"] == 2 and row["event"] == "sample" for row in rows()))
    assert old.wait(5) == -signal.SIGKILL
    node.feed(100)
    until(shows(rows, 100))
    assert new.poll() is None
    told = [row["text"] for row in rows() if row["event"] == "note"]
    assert told == ["took over from the sampler of attempt 1, which was still running"]


def test_two_stages_on_one_node_share_it_and_their_sum_is_what_it_drew(start: Start, node: Node, rows: Any) -> None:
    first = start("one")
    until(shows(rows, 0, "one"))
    node.feed(100)
    until(shows(rows, 100, "one"))
    second = start("two")
    until(lambda: rows("two")[2:] and rows("one")[-1].get("share") == 0.5)
    node.feed(1000)
    until(shows(rows, 600, "one"))
    until(shows(rows, 500, "two"))
    first.send_signal(signal.SIGINT)
    first.wait(5)
    until(lambda: "share" not in rows("two")[-1])
    node.feed(40)
    until(shows(rows, 540, "two"))
    second.send_signal(signal.SIGINT)
    second.wait(5)
    assert rows("one")[-1]["total_energy_j"] + rows("two")[-1]["total_energy_j"] == 1140
    assert any("2 stages of this user on the node: each counts 1/2" in row.get("text", "") for row in rows("one"))


def test_a_neighbour_that_was_killed_takes_no_share(start: Start, node: Node, rows: Any) -> None:
    start("one")
    until(shows(rows, 0, "one"))
    second = start("two")
    until(lambda: rows("one")[-1].get("share") == 0.5)
    second.kill()
    second.wait()
    until(lambda: rows("one")[-1]["event"] == "sample" and "share" not in rows("one")[-1])


def test_a_disk_that_is_full_for_a_while_costs_rows_but_no_joules(
    start: Start, node: Node, rows: Any, tmp_path: Path
) -> None:
    """The limit on a file's size stands for the disk: the line that meets it is cut, the next ones fail."""
    sampler = start()
    until(shows(rows, 0))
    file, process = tmp_path / "stage/energy-n1.jsonl", psutil.Process(sampler.pid)
    process.rlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 300, resource.RLIM_INFINITY))
    until(lambda: not file.read_bytes().endswith(b"\n"))
    size = file.stat().st_size
    node.feed(100)
    time.sleep(0.3)
    assert file.stat().st_size == size
    process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    until(shows(rows, 100))
    after = next(row for row in rows() if row.get("total_energy_j") == 100)
    assert after["gap_s"] >= 0.3
    sampler.send_signal(signal.SIGINT)
    sampler.wait(5)
    assert rows()[-1]["event"] == "end"
    assert len(file.read_text().splitlines()) == len(rows()) + 1, "one line is cut, and every other whole"


def test_a_sampler_that_was_suspended_says_so_and_its_counter_fills_the_gap(
    start: Start, node: Node, rows: Any
) -> None:
    sampler = start()
    until(shows(rows, 0))
    sampler.send_signal(signal.SIGSTOP)
    time.sleep(0.4)
    node.feed(100)
    sampler.send_signal(signal.SIGCONT)
    until(shows(rows, 100))
    assert max(row.get("gap_s", 0) for row in rows()) >= 0.4
    assert rows()[-1]["total_energy_j"] == 100


def test_a_meter_that_goes_away_is_told_with_the_time_since_it_answered(start: Start, node: Node, rows: Any) -> None:
    start()
    until(shows(rows, 0))
    file = node.root / "sys/cray/pm_counters/energy"
    file.rename(file.with_name("away"))
    until(lambda: rows()[-1].get("stale_s", {}).get("pm_counters", 0) > 2)
    row = rows()[-1]
    assert (row["total_energy_j"], row["total_power_w"]) == (0, None)
    assert "pm_counters cannot be read: FileNotFoundError" in next(r["text"] for r in rows() if r["event"] == "note")
    node.feed(100)
    until(shows(rows, 100))


def test_a_line_that_a_killed_sampler_left_is_ended_first(start: Start, rows: Any, tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    torn = json.dumps({"event": "start", "attempt": 1, "pid": 1}) + '\n{"event": "samp'
    (tmp_path / "stage/energy-n1.jsonl").write_text(torn)
    start(attempt=2)
    until(lambda: len(rows()) >= 3)
    assert [row["event"] for row in rows()[:3]] == ["start", "start", "sample"]
    assert power_series(tmp_path / "stage")[0][2] == 2


@pytest.mark.parametrize(
    ("environment", "num_gpus", "told"),
    [
        ({}, 4, None),
        ({"SLURM_JOB_CPUS_PER_NODE": "64(x2),32"}, 4, None),  # cores of a node with two threads each
        (
            {"SLURM_JOB_CPUS_PER_NODE": "16(x2)"},
            4,
            "upper bound: the job has 16 of 128 CPUs, the whole node is counted",
        ),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4, None),
        ({"SLURM_GPUS_ON_NODE": "2"}, 8, "upper bound: the job has 2 of 8 GPUs, the whole node is counted"),
    ],
)
def test_a_job_on_a_part_of_a_node_is_told_that_its_energy_is_an_upper_bound(
    environment: dict[str, str], num_gpus: int, told: str | None
) -> None:
    assert shared_with(environment, 128, num_gpus) == told
