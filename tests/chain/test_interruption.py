"""Ctrl-C, kill -9 and a lost rank: nothing is lost but the steps since the last checkpoint, and no bit changes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, Launch


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "stages/pretrain/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def final(run: Path) -> dict[int, Any]:
    """Last word on each step: training loss and held-out loss."""
    return {row["step"]: (row.get("loss"), row.get("heldout_loss")) for row in rows(run)}


def start(config: Path) -> "subprocess.Popen[str]":
    """`launch.py run` in a process group of its own, as a shell starts it."""
    command = [sys.executable, "launch.py", "run", str(config), "--set", f"run_root={config.parent}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


def wait_for_step(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in rows(run)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached in two minutes")


def kill_at_step(small: Path, step: int) -> None:
    """Run the small chain and pull the plug of its whole process group."""
    process = start(small)
    wait_for_step(small.parent / "small", step, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_run_killed_with_its_process_group_resumes_and_ends_bit_for_bit_the_same(
    small: Path, uninterrupted: Path, launch: Launch
) -> None:
    run = small.parent / "small"
    process = start(small)
    wait_for_step(run, 25, process)
    sampler = [child for child in family(process) if "hpc.energy.sampler" in " ".join(child.cmdline())]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run / "stages/pretrain/receipt.json").exists()
    assert psutil.wait_procs(sampler, timeout=5)[1] == [], "the sampler must notice that its stage is gone"

    result = launch("run", small, "--set", f"run_root={small.parent}")
    assert result.returncode == 0, result.stderr
    assert "pretrain: resume: an earlier attempt did not finish" in result.stdout
    second = [row["step"] for row in rows(run) if row["attempt"] == 2]
    assert second[0] == 21, "the newest checkpoint is that of step 20"
    assert final(run) == final(uninterrupted)
    receipts = [json.loads((folder / "stages/pretrain/receipt.json").read_text()) for folder in (run, uninterrupted)]
    weights = [[f["sha256"] for f in r["files"] if f["path"] == "model.safetensors"] for r in receipts]
    assert weights[0] == weights[1]
    assert receipts[0]["attempts"] == 2
    assert receipts[0]["metrics"]["replayed_steps"] >= 4


def test_a_killed_run_goes_on_with_fewer_ranks_and_another_layout(
    small: Path, uninterrupted: Path, launch: Launch
) -> None:
    run = small.parent / "small"
    kill_at_step(small, 25)

    train = "stages.pretrain.train"
    alone = ["--set", f"{train}.parallel={{zero_stage: 2}}", "--set", f"{train}.batches.micro_batch_size=8"]
    result = launch("run", small, "--set", f"run_root={small.parent}", *alone)
    assert result.returncode == 0, result.stderr
    assert "pretrain: resume: an earlier attempt did not finish" in result.stdout
    undisturbed = {row["step"]: row["loss"] for row in rows(uninterrupted) if row.get("loss")}
    second = {row["step"]: row["loss"] for row in rows(run) if row["attempt"] == 2 and row.get("loss")}
    assert min(second) == 21
    for step in range(21, 25):
        assert second[step] == pytest.approx(undisturbed[step], abs=1e-5)


def test_energy_of_a_killed_attempt_stays_in_the_ledger(small: Path, launch: Launch) -> None:
    run = small.parent / "small"
    kill_at_step(small, 12)
    assert launch("run", small, "--set", f"run_root={small.parent}").returncode == 0
    from hpc.energy.ledger import stage_ledger

    ledger = stage_ledger(run / "stages/pretrain")
    assert [part.attempt for part in ledger.nodes] == [1, 2]
    assert all(part.energy_j is not None and part.energy_j > 0 for part in ledger.nodes)
    assert {work.attempt for work in ledger.lost} == {1}
    assert next(work.steps for work in ledger.lost if work.kind == "replayed_steps") >= 2
    assert ledger.missing == ()
    receipt = json.loads((run / "stages/pretrain/receipt.json").read_text())
    assert receipt["energy"]["energy_j"] == pytest.approx(ledger.energy_j, rel=0.05)


def test_ctrl_c_saves_a_checkpoint_and_the_next_run_goes_on_from_it(
    small: Path, uninterrupted: Path, launch: Launch
) -> None:
    run = small.parent / "small"
    process = start(small)
    wait_for_step(run, 13, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to everybody
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "is safe; run the same command to go on" in errors
    assert errors.count("\n") == 1
    stopped_at = max(row["step"] for row in rows(run))
    assert (run / f"stages/pretrain/checkpoints/step-{stopped_at:08d}/MANIFEST.json").exists()

    assert launch("run", small, "--set", f"run_root={small.parent}").returncode == 0
    assert next(row["step"] for row in rows(run) if row["attempt"] == 2) == stopped_at + 1
    assert final(run) == final(uninterrupted)


def test_a_rank_that_dies_ends_the_stage_in_one_line_and_leaves_no_process(small: Path) -> None:
    run = small.parent / "small"
    process = start(small)
    wait_for_step(run, 8, process)
    children = family(process)
    ranks = [child for child in children if "submitit.core._submit" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 6, errors
    assert errors.startswith("error: stage 'pretrain':")
    assert errors.count("\n") == 1
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_a_second_launch_beside_a_running_one_is_refused(small: Path, launch: Launch) -> None:
    process = start(small)
    try:
        wait_for_step(small.parent / "small", 2, process)
        result = launch("run", small, "--set", f"run_root={small.parent}")
        assert result.returncode == 7
        assert "is in use by process" in result.stderr
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_in_a_stage_without_checkpoints_ends_it_at_once_and_leaves_nothing_half_done(
    small: Path, launch: Launch
) -> None:
    text = small.parent / "small/stages/text"
    process = start(small)
    deadline = time.monotonic() + 60
    while not (text / "artifact").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "it starts again with the next run" in errors
    assert not (text / "receipt.json").exists()
    assert launch("run", small, "--set", f"run_root={small.parent}").returncode == 0
