"""A run directory as plain data, at any time: while it runs, after it failed, with or without receipts."""

import os
import platform
import socket
import time
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import ValidationError

from hpc.config import Facility, RunConfig, Stage
from hpc.energy.goodput import run_goodput
from hpc.energy.ledger import RunLedger, StageLedger, run_ledger, run_stages, stage_ledger
from hpc.errors import ArtifactError, ConfigError
from hpc.plan.show import duration
from hpc.report.facts import AttemptSpan, RunFacts, StageFacts, State
from hpc.report.series import read_power
from hpc.run.directory import RunDirectory, StageDirectory, read_jsonl
from hpc.run.receipt import Receipt, code_version, read_receipt
from hpc.run.task import TaskFile, read_progress
from hpc.tracking.metrics import history

SILENT_AFTER_S = 180.0
"""A running stage writes a line of energy a second: after this long without any it is not called running any more."""


def gather(root: Path, ledger: RunLedger | None = None) -> RunFacts:
    """Everything that the directory of a run tells. Raises ConfigError when it is not one.

    ledger: the run's, where it was reconciled with other sources already; read here when left out.
    """
    run = RunDirectory(root.absolute())
    config = read_config(run)
    ledger = ledger or read_ledger(run.root)
    now = time.time()
    by_name = {stage.name: stage for stage in ledger.stages}
    stages = config.ordered()
    tasks = {stage.name: _task(run.stage(stage.name)) for stage in stages}
    return RunFacts(
        name=config.name,
        root=str(run.root),
        written=now,
        code_version=" ".join(str(word) for word in code_version().values() if word),
        machine=machine_words(run, tasks),
        stages=tuple(
            _stage(run.stage(stage.name), stage, tasks[stage.name], by_name.get(stage.name), now) for stage in stages
        ),
        ledger=ledger if ledger.stages else None,
        goodput=run_goodput(run.root),
        config=config.model_dump(mode="json"),
    )


def read_config(run: RunDirectory) -> RunConfig:
    """The configuration of a run. Raises ConfigError when there is none, or one of another version."""
    try:
        return RunConfig.model_validate(yaml.safe_load(run.config.read_text(encoding="utf-8")))
    except OSError:
        raise ConfigError(
            f"{run.root} is not a run directory: name the folder that `run` or `submit` printed"
        ) from None
    except (yaml.YAMLError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{run.config} was written by another version of GreenMoE ({first})") from None


def read_ledger(root: Path) -> RunLedger:
    """The ledger of a run. A stage whose receipt is damaged is named as missing and costs no other's joules."""
    try:
        return run_ledger(root)
    except ArtifactError:
        return RunLedger(root.name, tuple(_stage_ledger(folder) for folder in run_stages(root)), ())


def _stage_ledger(folder: Path) -> StageLedger:
    try:
        return stage_ledger(folder)
    except ArtifactError as error:
        return StageLedger(folder.name, "", None, None, None, 0.0, None, (), (), (str(error),), ())


def _task(directory: StageDirectory) -> TaskFile | None:
    """The task of a stage; None when it was never started, or by another version."""
    with suppress(OSError, ValidationError):
        return TaskFile.read(directory.task)
    return None


def _stage(
    directory: StageDirectory, stage: Stage, task: TaskFile | None, ledger: StageLedger | None, now: float
) -> StageFacts:
    attempts = read_attempts(directory, ledger, now)
    receipt: Receipt | None = None
    damaged = ""
    try:
        receipt = read_receipt(directory)
    except ArtifactError as error:
        damaged = str(error)
    state, text = _state(directory, receipt, attempts, now)
    if damaged:
        state, text = "damaged", damaged
    return StageFacts(
        name=stage.name,
        kind=stage.kind,
        produces=stage.produces,
        needs=tuple(stage.needs),
        state=state,
        text=text,
        seconds=receipt.seconds if receipt else None,
        attempts=attempts,
        metrics=receipt.metrics if receipt else {},
        provenance=receipt.provenance if receipt else {},
        size_bytes=receipt.size_bytes if receipt else None,
        digest=receipt.digest if receipt else None,
        code=receipt.code if receipt else {},
        ledger=ledger,
        facility=task.facility if task else Facility(),
        history=tuple(history(directory.metrics)),
        power=read_power(directory.root),
    )


def read_attempts(directory: StageDirectory, ledger: StageLedger | None, now: float) -> tuple[AttemptSpan, ...]:
    """The attempts of a stage. One that ended without a word lasts until its last sign of life."""
    rows = read_jsonl(directory.attempts)
    starts = [row for row in rows if row.get("event") == "start"]
    found: list[AttemptSpan] = []
    for start, following in zip_longest(starts, starts[1:]):
        number = int(start["attempt"])
        mine = [row for row in rows if row.get("attempt") == number]
        outcome, reason = _outcome(mine)
        ends = [float(row["time"]) for row in mine if row.get("event") == "end"]
        end = max(ends or [last_sign(directory, ledger, number, float(start["time"]))])
        if following is not None:
            end = min(end, float(following["time"]))
        elif outcome == "lost" and now - end < SILENT_AFTER_S:
            outcome, reason = "running", ""
        found.append(
            AttemptSpan(
                number, float(start["time"]), end, outcome, reason,
                max(1, len(start.get("nodes") or ())), int(start["ranks"]),
            )
        )  # fmt: skip
    return tuple(found)


def _outcome(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """How an attempt went and why, from its lines; the verdict of its job knows most."""
    ends = sorted((row for row in rows if row.get("event") == "end"), key=lambda row: float(row["time"]))
    verdicts = [str(row["reason"]) for row in rows if row.get("event") == "verdict" and row.get("reason")]
    dead = sorted({str(row["node"]) for row in rows if row.get("event") == "node"})
    failed = next((row for row in ends if row["outcome"] == "failed"), None)
    if ends and all(row["outcome"] == "done" for row in ends):
        return "done", ""
    outcome = "failed" if failed else str(ends[-1]["outcome"]) if ends and not dead else "lost"
    told = failed or (ends[-1] if ends else None)
    words = verdicts[-1] if verdicts else str(told["message"]) if told else ""
    return outcome, words or (f"node {', '.join(dead)} failed" if dead else "it ended without a word")


def last_sign(directory: StageDirectory, ledger: StageLedger | None, attempt: int, start: float) -> float:
    """When an attempt last wrote anything: progress, a row of metrics, a sample of energy."""
    progress = read_progress(directory)
    signs = [float(progress["time"])] if progress.get("attempt") == attempt else []
    signs += [float(row["time"]) for row in read_jsonl(directory.metrics) if row.get("attempt") == attempt]
    signs += [node.end for node in (ledger.nodes if ledger else ()) if node.attempt == attempt]
    return max(signs, default=start)


def _state(
    directory: StageDirectory, receipt: Receipt | None, attempts: tuple[AttemptSpan, ...], now: float
) -> tuple[State, str]:
    if receipt is not None:
        return "done", ""
    if not attempts:
        return "not started", ""
    last, progress = attempts[-1], read_progress(directory)
    if last.outcome == "running":
        done, whole = progress.get("done"), progress.get("total")
        share = f" {100 * done / whole:.0f} %" if done and whole else ""
        return "running", f"{progress.get('text', 'starting')}{share}"
    if last.outcome == "lost":
        return "silent", f"no sign of life for {duration(now - last.end)}"
    if last.outcome == "failed":
        return "failed", last.reason
    return "stopped", last.reason


def machine_words(run: RunDirectory, tasks: dict[str, TaskFile | None]) -> str:
    """The nodes that a run used, in words: its site's on Slurm, this machine's if it ran here; empty when unknown."""
    nodes = max((task.nodes for task in tasks.values() if task), default=0)
    ranks = max((task.ranks for task in tasks.values() if task), default=0)
    size = f", {nodes} node{'s' if nodes > 1 else ''}, {ranks} ranks" if nodes else ""
    if run.site.exists():
        site: dict[str, Any] = yaml.safe_load(run.site.read_text(encoding="utf-8"))
        hardware = site.get("hardware") or {}
        per_node = hardware.get("gpus_per_node")
        gpu = f", {per_node} x {hardware['gpu']} a node" if per_node and hardware.get("gpu") else ""
        return f"{site.get('description') or site.get('name')}{gpu}{size}"
    hosts = {row.get("host") for name in tasks for row in read_jsonl(run.stage(name).attempts)[:1]}
    return f"{describe_machine()}{size}" if hosts == {socket.gethostname()} else size.removeprefix(", ")


def describe_machine() -> str:
    """Processor, cores and memory of this node."""
    model = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
