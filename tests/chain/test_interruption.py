"""Ctrl-C, kill -9 and a lost rank: nothing is lost but the steps since the last checkpoint, and no bit changes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chain.conftest import SMALL, prepare
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


def start(config: Path, *more: str) -> "subprocess.Popen[str]":
    """`launch.py run` in a process group of its own, as a shell starts it."""
    command = [sys.executable, "launch.py", "run", str(config), "--set", f"run_root={config.parent}", *more]
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


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def killed(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small chain whose whole process group was killed after step 25. Tests go on with a copy."""
    folder = tmp_path_factory.mktemp("killed") / "chain"
    folder.mkdir()
    process = start(prepare(folder, uninterrupted))
    wait_for_step(folder / "small", 25, process)
    sampler = [child for child in family(process) if "hpc.energy.sampler" in " ".join(child.cmdline())]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "small/stages/pretrain/receipt.json").exists()
    assert psutil.wait_procs(sampler, timeout=5)[1] == [], "the sampler must notice that its stage is gone"
    return folder


def resume(killed: Path, folder: Path, launch: Launch, *more: str) -> Path:
    """Run a copy of the killed chain to its end; returns the run directory."""
    shutil.copytree(killed, folder)
    result = launch("run", folder / "small.yaml", "--set", f"run_root={folder}", *more)
    assert result.returncode == 0, result.stderr
    assert "pretrain: resume: an earlier attempt did not finish" in result.stdout
    return folder / "small"


@pytest.fixture(scope="module")
def resumed(killed: Path, launch: Launch) -> Path:
    """Run directory of the killed chain, resumed by the same command."""
    return resume(killed, killed.with_name("resumed"), launch)


def test_a_run_killed_with_its_process_group_resumes_and_ends_bit_for_bit_the_same(
    resumed: Path, uninterrupted: Path
) -> None:
    second = [row["step"] for row in rows(resumed) if row["attempt"] == 2]
    assert second[0] == 21, "the newest checkpoint is that of step 20"
    assert final(resumed) == final(uninterrupted)
    folders = (resumed, uninterrupted)
    receipts = [json.loads((folder / "stages/pretrain/receipt.json").read_text()) for folder in folders]
    weights = [[f["sha256"] for f in r["files"] if f["path"] == "model.safetensors"] for r in receipts]
    assert weights[0] == weights[1]
    assert receipts[0]["attempts"] == 2
    assert receipts[0]["metrics"]["replayed_steps"] >= 4


def test_a_killed_run_goes_on_with_fewer_ranks_and_another_layout(
    killed: Path, uninterrupted: Path, tmp_path: Path, launch: Launch
) -> None:
    train = "stages.pretrain.train"
    alone = ["--set", f"{train}.parallel={{zero_stage: 2}}", "--set", f"{train}.batches.micro_batch_size=8"]
    run = resume(killed, tmp_path / "alone", launch, *alone)
    undisturbed = {row["step"]: row["loss"] for row in rows(uninterrupted) if row.get("loss")}
    second = {row["step"]: row["loss"] for row in rows(run) if row["attempt"] == 2 and row.get("loss")}
    assert min(second) == 21
    for step in range(21, 25):
        assert second[step] == pytest.approx(undisturbed[step], abs=1e-5)


def test_energy_of_a_killed_attempt_stays_in_the_ledger(resumed: Path) -> None:
    from hpc.energy.ledger import stage_ledger

    ledger = stage_ledger(resumed / "stages/pretrain")
    assert [part.attempt for part in ledger.nodes] == [1, 2]
    assert all(part.energy_j is not None and part.energy_j > 0 for part in ledger.nodes)
    assert {work.attempt for work in ledger.lost} == {1}
    assert next(work.steps for work in ledger.lost if work.kind == "replayed_steps") >= 2
    assert ledger.missing == ()
    receipt = json.loads((resumed / "stages/pretrain/receipt.json").read_text())
    assert receipt["energy"]["energy_j"] == pytest.approx(ledger.energy_j, rel=0.05)


def test_ctrl_c_saves_a_checkpoint_and_the_next_run_goes_on_from_it(
    prepared: Path, uninterrupted: Path, launch: Launch
) -> None:
    run = prepared.parent / "small"
    process = start(prepared)
    wait_for_step(run, 13, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to everybody
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "is safe; run the same command to go on" in errors
    assert errors.count("\n") == 1
    stopped_at = max(row["step"] for row in rows(run))
    assert (run / f"stages/pretrain/checkpoints/step-{stopped_at:08d}/MANIFEST.json").exists()

    assert launch("run", prepared, "--set", f"run_root={prepared.parent}").returncode == 0
    assert next(row["step"] for row in rows(run) if row["attempt"] == 2) == stopped_at + 1
    assert final(run) == final(uninterrupted)


def test_a_second_launch_is_refused_and_a_rank_that_dies_ends_the_stage_in_one_line_and_leaves_no_process(
    prepared: Path, launch: Launch
) -> None:
    run = prepared.parent / "small"
    process = start(prepared, "--set", "stages.pretrain.train.steps=5000")  # there is time for both
    wait_for_step(run, 2, process)
    second = launch("run", prepared, "--set", f"run_root={prepared.parent}")
    assert second.returncode == 7
    assert "is in use by process" in second.stderr
    children = family(process)
    ranks = [child for child in children if "submitit.core._submit" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 6, errors
    assert errors.startswith("error: stage 'pretrain':")
    assert errors.count("\n") == 1
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_ctrl_c_in_a_stage_without_checkpoints_ends_it_at_once_and_leaves_nothing_half_done(
    small: Path, launch: Launch
) -> None:
    small.write_text(SMALL.split("  - name: pretrain")[0])
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
