"""Where a chain on Slurm stands, from the run directory and Slurm's tables, in words that a person uses.

Three commands at most, whatever the length of the chain: squeue, and sacct where jobs have left squeue's memory.
Without sacct the end of such a job is known from its own records only; `status` says when those are silent.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hpc.config import RunConfig, Stage
from hpc.energy.curves import read_samples, total_j
from hpc.energy.meter import newest_power
from hpc.errors import BudgetSpent, ConfigError, GateMissed
from hpc.plan.show import energy
from hpc.run.directory import RunDirectory, StageDirectory, read_jsonl
from hpc.run.receipt import Receipt, read_receipt
from hpc.run.task import read_progress
from slurm import commands
from slurm.batch import done_stages, stage_jobs
from slurm.commands import QueuedJob
from slurm.live import describe, result_words

State = Literal[
    "done",
    "running",
    "waiting",
    "held up",
    "failed",
    "gate missed",
    "budget spent",
    "cancelled",
    "not submitted",
    "unknown",
]
STYLE = {"done": "green", "running": "cyan", "failed": "red", "gate missed": "yellow", "budget spent": "yellow",
         "held up": "yellow", "cancelled": "yellow", "unknown": "red"}  # fmt: skip
BROKEN = {"failed", "gate missed", "budget spent", "cancelled", "held up", "unknown"}

REASONS = {
    "Dependency": "waits for what it needs",
    "DependencyNeverSatisfied": "what it needs has failed",
    "Priority": "other jobs are before it in the queue",
    "Resources": "next in the queue; no nodes are free",
    "BeginTime": "held back for a moment after a requeue",
    "None": "was submitted just now",
    "JobHeldUser": "held by its owner: scontrol release JOB",
    "JobHeldAdmin": "held by an administrator of the site",
    "ReqNodeNotAvail": "nodes are down or reserved",
    "Reservation": "waits for its reservation",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes no jobs at the moment",
    "PartitionTimeLimit": "asks for more time than the partition allows",
    "PartitionNodeLimit": "asks for more nodes than the partition has",
    "PartitionConfig": "asks for more than the partition has",
    "AssocGrpCPUMinutesLimit": "the account's budget is used up",
    "AssocGrpGRES": "the account's share of GPUs is in use",
    "AssocMaxJobsLimit": "the account's limit of running jobs is reached",
    "QOSMaxJobsPerUserLimit": "your limit of running jobs in this QoS is reached",
    "QOSGrpNodeLimit": "the QoS's nodes are all in use",
    "JobArrayTaskLimit": "the array's limit of running tasks is reached",
    "launch failed requeued held": "its nodes could not start it: scontrol release JOB",
}
"""Slurm's reason -> what it means."""


@dataclass(frozen=True)
class StageStatus:
    """One stage, as a person wants to know it."""

    name: str
    kind: str
    needs: tuple[str, ...]
    state: State
    text: str
    """Progress, result, or why it does not run."""
    job: str | None
    attempts: int
    energy_j: float | None
    is_estimated: bool


@dataclass(frozen=True)
class ChainStatus:
    """A chain at one moment."""

    run: RunDirectory
    name: str
    stages: tuple[StageStatus, ...]
    notes: tuple[str, ...]
    """What could not be found out, and what to do next."""

    @property
    def is_over(self) -> bool:
        """Whether nothing will happen without a person."""
        return not any(stage.state in ("running", "waiting") for stage in self.stages)

    @property
    def is_done(self) -> bool:
        """Whether every stage is done."""
        return all(stage.state == "done" for stage in self.stages)


def load_run(run: RunDirectory) -> RunConfig:
    """The configuration that a run directory was submitted with. Raises ConfigError."""
    try:
        return RunConfig.model_validate(yaml.safe_load(run.config.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValueError):
        raise ConfigError(f"{run.root} is not a run directory: name the folder that `submit` printed") from None


def chain_status(run: RunDirectory) -> ChainStatus:
    """Look at everything once. Raises ConfigError or SiteError."""
    config = load_run(run)
    jobs = stage_jobs(run)
    queue = {job.job: job for job in commands.queue()}
    done = set(done_stages(run, config))
    forgotten = [job for name, job in jobs.items() if job not in queue and name not in done]
    remembered = commands.accounting(forgotten) if forgotten else []
    known = {**{job.job: job for job in remembered or []}, **queue}
    stages: dict[str, StageStatus] = {}
    for stage in config.ordered():
        stages[stage.name] = _status(run, stage, stage.name in done, jobs.get(stage.name), known, stages)
    notes = []
    if remembered is None and any(stage.state == "unknown" for stage in stages.values()):
        notes.append("sacct does not answer here: how a forgotten job ended is known only from what it wrote itself")
    broken = [stage.name for stage in stages.values() if stage.state in BROKEN and stage.state != "held up"]
    if broken and not any(stage.state in ("running", "waiting") for stage in stages.values()):
        notes.append(f"next: python launch.py logs {run.root} {broken[0]}, then retry {run.root} {broken[0]}")
    if all(stage.state == "done" for stage in stages.values()) and run.report.exists():
        notes.append(f"report: {run.report}")
    return ChainStatus(run, config.name, tuple(stages.values()), tuple(notes))


def _status(
    run: RunDirectory,
    stage: Stage,
    is_done: bool,
    job: str | None,
    known: dict[str, QueuedJob],
    others: dict[str, StageStatus],
) -> StageStatus:
    directory = run.stage(stage.name)
    rows = read_jsonl(directory.attempts)
    attempts = sum(row.get("event") == "start" for row in rows)
    state, text = _state(run, stage, directory, is_done, rows, job, known, others)
    joules, is_estimated = _energy(directory, read_receipt(directory) if is_done else None)
    return StageStatus(
        stage.name, stage.kind, tuple(stage.needs), state, text, job, attempts, joules, is_estimated
    )  # fmt: skip


def _state(
    run: RunDirectory,
    stage: Stage,
    directory: StageDirectory,
    is_done: bool,
    rows: list[dict[str, Any]],
    job: str | None,
    known: dict[str, QueuedJob],
    others: dict[str, StageStatus],
) -> tuple[State, str]:
    if is_done:
        receipt = read_receipt(directory)
        return "done", result_words(receipt) if receipt else ""
    found = known.get(job) if job else None
    if found is not None and found.is_alive:
        return _alive(directory, stage, found, rows, others)
    broken = [need for need in stage.needs if others[need].state in BROKEN]
    if broken:
        return "held up", f"not run: it needs {broken[0]} ({others[broken[0]].state})"
    last = _since_submission(rows)
    verdict = next((row for row in reversed(last) if row["event"] == "verdict"), None)
    if verdict is not None and verdict["action"] == "fail":
        codes = {row.get("exit_code") for row in last}
        is_gate, is_spent = GateMissed.exit_code in codes, BudgetSpent.exit_code in codes
        return ("gate missed" if is_gate else "budget spent" if is_spent else "failed"), verdict["reason"]
    if job is None:
        is_cancelled = any(
            row["event"] == "cancel" and stage.name in row["stages"] for row in read_jsonl(run.submissions)
        )
        return ("cancelled", "by `launch.py cancel`") if is_cancelled else ("not submitted", "")
    if found is None:
        return "unknown", f"job {job} is no longer known to Slurm and left no receipt"
    if found.state.startswith("CANCELLED"):
        return "cancelled", f"job {job} was cancelled"
    if found.state == "TIMEOUT":
        return "failed", "its time limit came before it could save: raise resources.time_limit_min"
    if found.state == "OUT_OF_MEMORY":
        return "failed", "out of memory: ask for more memory or lower micro_batch_size"
    if not any(row["event"] == "start" for row in last):
        return "failed", f"job {job} ended ({found.state.lower()}) before the stage began: see `launch.py logs`"
    return "failed", f"job {job} ended as {found.state.lower()}"


def _alive(
    directory: StageDirectory,
    stage: Stage,
    found: QueuedJob,
    rows: list[dict[str, Any]],
    others: dict[str, StageStatus],
) -> tuple[State, str]:
    if found.state == "PENDING":
        waiting = [need for need in stage.needs if others[need].state != "done"]
        if found.reason == "Dependency" and waiting:
            return "waiting", f"for {', '.join(waiting)}"
        reason = REASONS.get(found.reason.strip("()").split(",")[0], found.reason)
        verdict = next((row for row in reversed(rows) if row.get("event") == "verdict"), None)
        if verdict is not None and verdict["action"] in ("requeue", "leave"):
            reason = f"requeued ({verdict['reason']}); {reason}"
        start = f", expected to start {found.start}" if found.start not in ("", "N/A", "Unknown") else ""
        return "waiting", f"{reason}{start}"
    progress = read_progress(directory)
    attempt = max((row["attempt"] for row in rows if row.get("event") == "start"), default=0)
    if progress.get("attempt") != attempt or time.time() - float(progress.get("time", 0)) > 3600:
        return "running", f"{found.state.lower()} on {found.nodes}"
    return "running", f"{describe(progress, newest_power(directory.root, attempt))}  on {found.nodes}"


def _since_submission(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    last = max((index for index, row in enumerate(rows) if row.get("event") == "submit"), default=-1)
    return list(rows[last + 1 :])


def _energy(directory: StageDirectory, receipt: Receipt | None) -> tuple[float | None, bool]:
    if receipt is not None:
        return receipt.energy.get("energy_j"), "estimated" in str(receipt.energy.get("provenance"))
    samples = read_samples(directory.root)
    return total_j(samples), any("estimated" in source for one in samples for source in one.provenance)


def render(status: ChainStatus) -> Table:
    """The chain as a tree: a stage stands below the last of what it needs."""
    table = Table(box=None, padding=(0, 1), show_header=True, header_style="dim")
    for heading in ("stage", "state", "tries", "energy", "job"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("tries", "energy") else "left")
    table.add_column("", overflow="fold")
    for stage, prefix in _tree(status.stages):
        joules = "-" if stage.energy_j is None else ("~" if stage.is_estimated else "") + energy(stage.energy_j)
        name, state = Text(prefix + stage.name, "bold"), Text(stage.state, STYLE.get(stage.state, ""))
        table.add_row(name, state, str(stage.attempts or "-"), joules, stage.job or "-", Text(stage.text))
    return table


def _tree(stages: Sequence[StageStatus]) -> list[tuple[StageStatus, str]]:
    """Stages in tree order with the lines that lead to them. Of several needs, the one furthest down is the parent."""
    place = {stage.name: index for index, stage in enumerate(stages)}
    children: dict[str | None, list[StageStatus]] = {}
    for stage in stages:
        parent = max(stage.needs, key=lambda need: place[need], default=None)
        children.setdefault(parent, []).append(stage)
    rows: list[tuple[StageStatus, str]] = []

    def walk(parent: str | None, indent: str) -> None:
        below = children.get(parent, [])
        for index, stage in enumerate(below):
            is_last = index + 1 == len(below)
            rows.append((stage, "" if parent is None else indent + ("└ " if is_last else "├ ")))
            walk(stage.name, "" if parent is None else indent + ("  " if is_last else "│ "))

    walk(None, "")
    return rows


def show(status: ChainStatus, console: Console | None = None) -> None:
    """Print a status."""
    console = console or Console(highlight=False, soft_wrap=False, width=None if Console().is_terminal else 160)
    done = sum(stage.state == "done" for stage in status.stages)
    spent = [stage.energy_j for stage in status.stages if stage.energy_j is not None]
    total = f", {'~' if any(s.is_estimated for s in status.stages) else ''}{energy(sum(spent))} so far" if spent else ""
    console.print(f"{status.name}: {done} of {len(status.stages)} stages done{total}")
    console.print(render(status))
    for note in status.notes:
        console.print(note, markup=False)
    if any(stage.is_estimated for stage in status.stages):
        console.print("~ estimated, not measured", style="dim")


def watch_chain(run: RunDirectory, every_s: float) -> None:
    """Show the status until nothing will happen without a person. Plain text where there is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        while not (status := chain_status(run)).is_over:
            time.sleep(every_s)
        show(status)
        return
    with Live(console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            status = chain_status(run)
            live.update(Group(f"{status.name}   {time.strftime('%H:%M:%S')}", render(status)), refresh=True)
            if status.is_over:
                break
            time.sleep(every_s)
    for note in status.notes:
        console.print(note, markup=False)
