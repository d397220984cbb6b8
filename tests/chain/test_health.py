"""A rank that stands still ends the attempt with its own exit code; a lack of memory is told with numbers."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hpc.config.load import load_config
from hpc.plan.plan import plan
from hpc.run.directory import RunDirectory
from hpc.run.task import TaskFile
from slurm.chain import stage_plan, task_file
from slurm.restart import judge
from slurm.site import load_site
from slurm.worker import explain_failure
from tests.chain.test_interruption import family, start, wait_for_step
from tests.conftest import ROOT
from tests.slurm.test_policy import SUBMIT, decide, end, verdict
from tests.slurm.test_policy import start as began


def test_a_suspended_rank_ends_the_attempt_with_the_stacks_of_the_others(prepared: Path) -> None:
    run = prepared.parent / "small"
    prepared.write_text(prepared.read_text() + "      health: {hang: {step_s: 4}}\n")
    process = start(prepared)
    wait_for_step(run, 3, process)
    children = family(process)
    ranks = [child for child in children if "submitit.core._submit" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    next(rank for rank in ranks if rank.environ()["SUBMITIT_LOCAL_GLOBALID"] == "1").send_signal(signal.SIGSTOP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 11, errors
    assert "rank 0 on" in errors
    assert "no progress in section 'step' for 4 s (train.health.hang.step_s)" in errors
    assert errors.count("\n") == 1
    stage = run / "stages/pretrain"
    stacks = (stage / "stacks-attempt-1-rank-0.txt").read_text()
    assert "distributed_c10d.py" in stacks, "where it waits"
    assert "hpc/train/loop.py" in stacks, "and for whom"
    assert json.loads((stage / "hung-attempt-1").read_text())["rank"] == 0
    log = next(path.read_text() for path in (stage / "jobs").rglob("*_0_log.err") if "watchdog: " in path.read_text())
    assert "hpc/train/loop.py" in log
    assert psutil.wait_procs(children, timeout=20)[1] == [], "the suspended rank is gone too"


def test_a_hang_is_tried_again_like_a_crash_and_says_so() -> None:
    hung = end(1, 0, "failed", 11, "rank 0 on n1: no progress in section 'step' for 600 s", True)
    found = decide([began(1), hung], step=10)
    assert (found.action, found.cause) == ("requeue", "crash")
    assert found.reason == "hang: rank 0 on n1: no progress in section 'step' for 600 s", "not: rank 1 was lost"
    stuck = decide([began(1), hung, verdict(1, "crash", 10), began(2), {**hung, "attempt": 2}], step=10)
    assert stuck.action == "fail"
    assert judge([SUBMIT, began(1), hung], has_receipt=False, step=10, retries=0).action == "fail"


def task(small: Path, *overrides: str) -> TaskFile:
    loaded = load_config(small, overrides)
    site = load_site("local")
    stage = loaded.stage("pretrain")
    planned = stage_plan(plan(loaded, site.machine), stage)
    return task_file(RunDirectory(small.parent / "small"), loaded, site, stage, planned)


def no_memory() -> RuntimeError:
    """What the real allocator says."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


def told(asked: TaskFile, gib: float, folder: Path, error: BaseException | None = None) -> str:
    machine = asked.machine.model_copy(update={"memory_gib_per_rank": gib})
    found, is_crash = explain_failure(error or no_memory(), folder, asked.model_copy(update={"machine": machine}))
    assert not is_crash
    assert (found.exit_code, str(found).count("\n")) == (6, 0)
    assert str(found).startswith("out of memory (")
    return str(found)


@pytest.mark.parametrize("error", [None, MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")])
def test_running_out_of_memory_says_which_micro_batch_would_fit(small: Path, error: BaseException | None) -> None:
    """tokens_per_step is 24 sequences a rank: 24, 12, 8, 6 ... divide it, 16 does not."""
    batches = "stages.pretrain.train.batches"
    asked = task(small, f"{batches}.micro_batch_size=24", f"{batches}.tokens_per_step={2 * 24 * 64}",
                 "stages.pretrain.train.steps=100000")  # fmt: skip
    room = (needed(asked, 8) + needed(asked, 12)) / 2 / 2**30
    message = told(asked, room, small.parent, error)
    assert f"micro_batch_size = 24 needs about {needed(asked, 24) / 2**30:.1f} GiB of {room:g} per rank" in message
    assert "set batches.micro_batch_size to 8 (" in message
    assert "set batches.micro_batch_size to 12 (" in told(asked, 99.0, small.parent, error), "less is free than stated"
    assert "no micro_batch_size fits 1e-06 GiB per rank" in told(asked, 1e-6, small.parent, error)


def needed(asked: TaskFile, micro_batch_size: int) -> float:
    from hpc.config import RunConfig
    from hpc.plan.facts import model_facts
    from hpc.plan.fit import planned_bytes

    facts: Any = model_facts(RunConfig(name="x", stages=asked.stages), "pretrain")
    return planned_bytes(facts, asked.stage.train, asked.machine, micro_batch_size)


@pytest.mark.slow
def test_memory_that_does_not_suffice_shows_before_the_first_step(small: Path) -> None:
    """A real limit on the address space, met by the rehearsal; the plan had no way to know of it."""
    command = [sys.executable, "launch.py", "run", str(small), "--set", f"run_root={small.parent}",
               "--set", "stages.pretrain.train.batches={seq_len: 512, micro_batch_size: 512, tokens_per_step: 524288}",
               "--set", "stages.pretrain.train.steps=6"]  # fmt: skip
    limit = 6_000_000 * 1024
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=400,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 6, result.stderr
    assert "out of memory (RuntimeError: " in result.stderr
    assert "so less is free than it states: set batches.micro_batch_size to 256" in result.stderr
    assert not (small.parent / "small/stages/pretrain/metrics.jsonl").exists()
