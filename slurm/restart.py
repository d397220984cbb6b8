"""What happens after an attempt of a Slurm job: the last command of its script decides, and no daemon has to live.

    python -m slurm.restart RUN STAGE [STAGE ...] --status STATUS

runs on the job's first node when all ranks are gone, whatever ended them. With several stages the job is an array and
its task id chooses. Preemption and time limits lead back to the queue as long as checkpoints progress; a crash, or a
hang that the watchdog ended, as long as it makes progress and at most `retries` times; running out of memory, bad
settings, missed gates and a spent energy budget never. A node that dies takes this decision along: then Slurm itself
requeues the job.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.errors import BudgetSpent, GateMissed, Hung, StageError
from hpc.run.attempts import failing_nodes, newest_step
from hpc.run.directory import RunDirectory, append_jsonl, read_jsonl
from hpc.run.task import TaskFile
from slurm import commands

Action = Literal["done", "requeue", "fail", "leave"]
FRUITLESS = 3
"""Attempts in a row that may end without a new checkpoint before the job gives up."""
DECIDED = {"CANCELLED", "PREEMPTED", "TIMEOUT", "NODE_FAIL", "PENDING", "COMPLETING", "REQUEUED"}
"""Slurm has decided already."""


@dataclass(frozen=True)
class Verdict:
    """What is done with a job after an attempt."""

    action: Action
    reason: str
    cause: Literal["", "crash", "stopped"] = ""
    """Why it goes back to the queue."""


def judge(rows: Sequence[dict[str, Any]], *, has_receipt: bool, step: int, retries: int, log_tail: str = "") -> Verdict:
    """Decide from the attempt records of a stage. `step` is that of its newest checkpoint. Pure.

    `log_tail` is the end of the job's error log, where Slurm tells of processes that ran out of memory.
    """
    since = max((index for index, row in enumerate(rows) if row.get("event") == "submit"), default=-1)
    rows = rows[since + 1 :]
    starts = [row for row in rows if row.get("event") == "start"]
    if not starts:
        return Verdict("fail", "the job ended before the stage began: see its log")
    attempt, ranks = starts[-1]["attempt"], starts[-1]["ranks"]
    ends = {row["rank"]: row for row in rows if row.get("event") == "end" and row["attempt"] == attempt}
    lost = sorted(set(range(ranks)) - set(ends))
    outcomes = {row["outcome"] for row in ends.values()}
    if has_receipt and outcomes == {"done"} and not lost:
        return Verdict("done", "")
    final = next((row for row in ends.values() if row["outcome"] == "failed" and not row["is_crash"]), None)
    if final is not None:
        words = "gate" if final["exit_code"] == GateMissed.exit_code else f"rank {final['rank']}"
        return Verdict("fail", final["message"] if words == "gate" else f"{words}: {final['message']}")
    if "oom" in log_tail.lower() or "out of memory" in log_tail.lower():
        return Verdict("fail", "out of memory: Slurm killed a process; ask for more memory or lower micro_batch_size")
    spent = next((ends[rank] for rank in sorted(ends) if ends[rank]["exit_code"] == BudgetSpent.exit_code), None)
    if spent is not None:
        return Verdict("fail", spent["message"])
    if "stopped" in outcomes and "failed" not in outcomes and not lost:
        return _again(
            rows,
            "stopped",
            "stopped by preemption, a time limit or on request",
            step,
            FRUITLESS,
            "no checkpoint was possible in",
        )
    hang = next((row for row in ends.values() if row["exit_code"] == Hung.exit_code), None)
    crash = next((row for row in sorted(ends.values(), key=lambda row: float(row["time"])) if row["is_crash"]), None)
    reason = (
        f"hang: {hang['message']}"
        if hang
        else f"rank {', '.join(map(str, lost))} of {ranks} was lost without a word"
        if lost
        else f"rank {crash['rank']}: {crash['message']}"
        if crash
        else "no receipt although every rank was done"
    )
    crashes = sum(row.get("event") == "verdict" and row.get("cause") == "crash" for row in rows)
    if crashes >= retries:
        return Verdict("fail", f"{reason} (crash {crashes + 1}; retries = {retries})")
    return _again(rows, "crash", reason, step, 1, "no progress since the last crash in")


def _again(
    rows: Sequence[dict[str, Any]],
    cause: Literal["crash", "stopped"],
    reason: str,
    step: int,
    allowed: int,
    why_not: str,
) -> Verdict:
    """Requeue unless the last `allowed` attempts with the same cause left no newer checkpoint."""
    before = [row["checkpoint"] for row in rows if row.get("event") == "verdict" and row.get("cause") == cause]
    fruitless = 0
    for checkpoint in reversed(before):
        if checkpoint < step:
            break
        fruitless += 1
    if fruitless >= allowed:
        return Verdict("fail", f"{reason}; {why_not} {fruitless + 1} attempts, at step {step}: raise the time limit")
    return Verdict("requeue", reason, cause)


def conclude(run: RunDirectory, stage: str, job: str, log: Path) -> Verdict:
    """Judge the attempt that has just ended, record the verdict and requeue when it says so.

    job: as Slurm's commands take it.
    """
    directory = run.stage(stage)
    task = TaskFile.read(directory.task)
    rows, step = read_jsonl(directory.attempts), newest_step(directory)
    tail = log.read_text(errors="replace")[-4000:] if log.exists() else ""
    verdict = judge(rows, has_receipt=directory.receipt.exists(), step=step, retries=task.retries, log_tail=tail)
    if verdict.action == "requeue" and is_cancelled(run, stage):
        verdict = Verdict("fail", "cancelled")
    elif verdict.action == "requeue" and (state := commands.job_state(job)) in DECIDED:
        verdict = Verdict("leave", f"{verdict.reason}; Slurm has it as {state}")
    number = sum(row.get("event") == "start" for row in rows)

    def record(verdict: Verdict) -> Verdict:
        row = {"event": "verdict", "attempt": number, "time": time.time(), "checkpoint": step, "job": job}
        append_jsonl(directory.attempts, {**row, **asdict(verdict)})
        return verdict

    record(verdict)  # first: once requeued, this process has not long to live
    if verdict.action == "requeue":
        chain = [run.stage(path.name) for path in directory.root.parent.iterdir() if path.is_dir()]
        problem = commands.requeue(job, failing_nodes(chain))
        if problem:
            reason = f"{verdict.reason}; it could not be requeued ({problem}): use `launch.py resume`"
            return record(Verdict("fail", reason))
    return verdict


def is_cancelled(run: RunDirectory, stage: str) -> bool:
    """Whether a person cancelled the newest submission of a stage."""
    rows = [row for row in read_jsonl(run.submissions) if stage in row.get("stages", [])]
    return bool(rows) and rows[-1]["event"] == "cancel"


def main() -> None:
    """The command at the end of a job script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--status", type=int, required=True, help="exit status of srun")
    options = parser.parse_args()
    os.umask(0o077)
    run, job = RunDirectory(options.run), commands.this_job()
    stage = options.stages[int(job.partition("_")[2] or 0)]
    verdict = conclude(run, stage, job, run.jobs / f"{job}_0_log.err")
    print(f"{stage}: {verdict.action}: {verdict.reason} (srun ended with {options.status})", flush=True)
    if verdict.action in ("requeue", "leave"):
        time.sleep(60)  # Slurm ends this script; what it returns does not count
    sys.exit(0 if verdict.action == "done" else StageError.exit_code)


if __name__ == "__main__":
    main()
