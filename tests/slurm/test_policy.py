"""What shares a job, what it waits for, and what happens after an attempt: decided by pure functions."""

import time
from typing import Any

import pytest

from hpc.config.load import load_config
from hpc.run.task import StopRequest
from slurm.jobs import dependency, group
from slurm.restart import Verdict, judge
from tests.conftest import ROOT

SUBMIT = {"event": "submit", "time": 0.0}


def start(attempt: int, ranks: int = 2) -> dict[str, Any]:
    return {"event": "start", "attempt": attempt, "ranks": ranks, "time": 10.0 * attempt}


def end(attempt: int, rank: int, outcome: str, code: int = 0, message: str = "", crash: bool = False) -> dict[str, Any]:
    return {"event": "end", "attempt": attempt, "rank": rank, "time": 10.0 * attempt + rank, "outcome": outcome,
            "exit_code": code, "message": message, "is_crash": crash}  # fmt: skip


def verdict(attempt: int, cause: str, checkpoint: int) -> dict[str, Any]:
    return {"event": "verdict", "attempt": attempt, "action": "requeue", "cause": cause, "checkpoint": checkpoint}


def both(attempt: int, outcome: str, **more: Any) -> list[dict[str, Any]]:
    return [start(attempt), end(attempt, 0, outcome, **more), end(attempt, 1, outcome, **more)]


def decide(rows: list[dict[str, Any]], step: int = 0, **more: Any) -> Verdict:
    return judge([SUBMIT, *rows], has_receipt=more.pop("has_receipt", False), step=step, retries=3, **more)


def test_done_means_a_receipt_and_a_word_from_every_rank() -> None:
    assert decide(both(1, "done"), has_receipt=True).action == "done"
    lost = decide([start(1), end(1, 0, "done")], has_receipt=True)
    assert (lost.action, lost.reason) == ("requeue", "rank 1 of 2 was lost without a word")
    assert decide(both(1, "done")).action == "requeue"


def test_preemption_and_time_limits_requeue_without_end_while_checkpoints_progress() -> None:
    rows: list[dict[str, Any]] = []
    for attempt in range(1, 50):
        rows += both(attempt, "stopped")
        assert decide(rows, step=10 * attempt).action == "requeue"
        rows.append(verdict(attempt, "stopped", 10 * attempt))


def test_a_time_limit_too_short_for_one_checkpoint_ends_the_job_and_says_so() -> None:
    rows: list[dict[str, Any]] = []
    for attempt in range(1, 4):
        rows += both(attempt, "stopped")
        assert decide(rows, step=7).action == "requeue"
        rows.append(verdict(attempt, "stopped", 7))
    last = decide([*rows, *both(4, "stopped")], step=7)
    assert last.action == "fail"
    assert "raise the time limit" in last.reason


def test_a_crash_is_tried_again_as_long_as_it_makes_progress_and_at_most_retries_times() -> None:
    crash: dict[str, Any] = {"code": 6, "message": "RuntimeError: x", "crash": True}
    rows = both(1, "failed", **crash)
    first = decide(rows, step=10)
    assert (first.action, first.reason) == ("requeue", "rank 0: RuntimeError: x")
    stuck = decide([*rows, verdict(1, "crash", 10), *both(2, "failed", **crash)], step=10)
    assert stuck.action == "fail"
    assert "no progress" in stuck.reason
    for attempt in (1, 2, 3):
        rows += [verdict(attempt, "crash", 10 * attempt), *both(attempt + 1, "failed", **crash)]
    tired = decide(rows, step=50)
    assert (tired.action, "retries = 3" in tired.reason) == ("fail", True)
    assert decide([*rows, SUBMIT, *both(5, "failed", **crash)], step=50).action == "requeue", "a retry counts afresh"


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [
        (2, "expert_parallel_size: 3", "rank 0: expert_parallel_size: 3"),
        (6, "out of memory (x)", "rank 0: out of memory (x)"),
        (9, "gate 'a < 1' missed: b has a = 2", "gate 'a < 1' missed: b has a = 2"),
    ],
)
def test_what_would_happen_again_is_never_tried_again(code: int, message: str, expected: str) -> None:
    found = decide(both(1, "failed", code=code, message=message), step=10)
    assert found == Verdict("fail", expected)


def test_a_process_that_slurm_killed_for_memory_is_not_tried_again() -> None:
    log = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed."
    found = decide([start(1), end(1, 0, "failed", 6, "x", True)], step=10, log_tail=log)
    assert found.action == "fail"
    assert "out of memory" in found.reason


def test_a_job_that_never_began_fails_and_points_at_its_log() -> None:
    assert decide([]) == Verdict("fail", "the job ended before the stage began: see its log")


def test_the_end_of_a_job_is_known_in_advance() -> None:
    stop = StopRequest()
    assert not stop.runs_out(1e9)
    stop.deadline = time.time() + 60
    assert not stop.runs_out(30)
    assert stop.runs_out(90)


def test_paired_tasks_wait_for_their_own_partner_and_everything_else_for_all() -> None:
    jobs = {"base": "7", "lora-a": "8_0", "lora-b": "8_1"}
    assert dependency([["base", "lora-a"], ["base", "lora-b"]], jobs) == "afterok:7,aftercorr:8"
    assert dependency([["lora-b"], ["lora-a"]], jobs) == "afterok:8_1:8_0"
    assert dependency([["lora-a", "lora-b"]], jobs) == "afterok:8_0:8_1"
    assert dependency([["lora-a"]], {"lora-a": "8_0"}) == "afterok:8_0"
    assert dependency([["done before"]], jobs) is None


def test_members_of_a_matrix_share_a_job_unless_one_needs_another() -> None:
    loaded = load_config(ROOT / "configs/quickstart.yaml")
    groups = [tuple(stage.name for stage in members) for members in group(loaded, list(loaded.ordered()))]
    assert ("lora-modern", "lora-python") in groups
    assert ("merge-modern", "merge-python") in groups
    order = [name for members in groups for name in members]
    for stage in loaded.stages:
        assert all(order.index(need) < order.index(stage.name) for need in stage.needs)
