"""Run a chain on this machine: decide about each stage, start its job, watch it, and stop cleanly when asked."""

import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from hpc.config import RunConfig, Stage
from hpc.errors import BudgetSpent, GateMissed, GreenMoEError, StageError, Stopped, error_by_exit_code
from hpc.plan.plan import Plan, StagePlan
from hpc.run.attempts import attempt_ends, count_attempts, exclusive
from hpc.run.directory import (
    RunDirectory,
    StageDirectory,
    full_disk,
    is_full,
    storage_errors,
    write_atomic,
    write_json,
)
from hpc.run.receipt import read_receipt
from hpc.run.task import TaskFile
from slurm.fetch import fetch_sources
from slurm.live import View, result_words
from slurm.site import Site
from slurm.state import Decision, decide, input_digests, missed_gate
from slurm.submit import LocalStage, submit_local
from slurm.worker import StageTask

POLL_S = 0.25
GRACE_S = 10.0
"""Seconds that the other ranks have to end by themselves after one has failed."""


def run_chain(config: RunConfig, site: Site, plan: Plan) -> RunDirectory:
    """Run every stage whose receipt is not valid. Raises the GreenMoEError of the stage that failed, or Stopped.

    A missed gate holds up what depends on it; the rest runs, then GateMissed is raised.
    """
    missed: dict[str, str] = {}
    run = RunDirectory.create(Path(config.run_root), config.name)
    with exclusive(run.lock, f"the run directory {run.root}"):
        write_atomic(run.config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        write_json(run.plan, plan.to_json())
        fetch_sources(run, config)
        with View([stage.name for stage in config.ordered()]) as view, _stop_requests() as stop:
            for stage in config.ordered():
                held_up = [need for need in stage.needs if need in missed]
                reason = f"it needs {held_up[0]}" if held_up else missed_gate(run, stage)
                if reason:
                    missed[stage.name] = reason
                    view.say(stage.name, f"not run: {reason}")
                    continue
                _run_stage(run, config, site, stage, stage_plan(plan, stage), view, stop)
    if missed:
        name = next(iter(missed))
        raise GateMissed(f"stage {name!r} was not run: {missed[name]}; what does not depend on it is done")
    return run


def _run_stage(
    run: RunDirectory, config: RunConfig, site: Site, stage: Stage, planned: StagePlan, view: View, stop: list[int]
) -> None:
    decision = decide(run, config, stage)
    if decision.action == "reuse":
        receipt = read_receipt(run.stage(stage.name))
        view.say(stage.name, f"reused ({result_words(receipt)})" if receipt else "reused")
        return
    if stop:
        raise Stopped("stopped between stages; run the same command to go on")
    directory = _make_ready(run, stage, decision)
    ranks = planned.nodes * planned.ranks_per_node
    task_file(run, config, site, stage, planned).write(directory.task)
    attempt = count_attempts(directory) + 1
    view.say(stage.name, f"{decision.action}: {decision.reason}" if decision.action != "run" else "started")
    job = submit_local(StageTask(str(directory.root), uuid.uuid4().hex), directory, ranks, site.machine)
    _watch(job, stage.name, directory, attempt, view, stop)
    if len(stop) > 1 and not directory.receipt.exists():
        raise Stopped(
            f"stage {stage.name!r}: killed on request; run the same command to go on from the last checkpoint"
        )
    _conclude(stage, directory, attempt, view)


def task_file(run: RunDirectory, config: RunConfig, site: Site, stage: Stage, planned: StagePlan) -> TaskFile:
    """What a worker has to know about a stage."""
    return TaskFile(
        run=config.name,
        run_directory=str(run.root),
        stage=stage,
        stages=config.stages,
        inputs=input_digests(run, stage),
        seed=config.seed,
        tracking=config.tracking,
        machine=site.machine,
        facility=site.facility,
        ranks=planned.nodes * planned.ranks_per_node,
        nodes=planned.nodes,
        retries=config.retries,
        energy_budget_kwh=config.energy_budget_kwh,
        network_interface=site.network_interface,
    )


def _make_ready(run: RunDirectory, stage: Stage, decision: Decision) -> StageDirectory:
    if decision.action == "again":
        run.supersede(stage.name)
    directory = run.stage(stage.name)
    with storage_errors(directory.root):
        directory.root.mkdir(parents=True, exist_ok=True)
    return directory


def _watch(job: LocalStage, name: str, directory: StageDirectory, attempt: int, view: View, stop: list[int]) -> None:
    """Until the job ends. The first Ctrl-C asks for a stop, the second one kills; a failed rank ends the others."""
    asked, failed_at = 0, 0.0
    while job.is_running:
        time.sleep(POLL_S)
        view.update(name, directory, attempt)
        if len(stop) > asked:
            asked = len(stop)
            if asked == 1:
                view.say(name, "stopping: saving a checkpoint first (Ctrl-C again to kill)")
                job.request_stop()
            else:
                job.kill()
        if not failed_at and any(row["outcome"] == "failed" for row in attempt_ends(directory, attempt)):
            failed_at = time.monotonic()
        if failed_at and time.monotonic() - failed_at > GRACE_S:
            job.kill()


def _conclude(stage: Stage, directory: StageDirectory, attempt: int, view: View) -> None:
    receipt = read_receipt(directory)
    if receipt is not None:
        view.say(stage.name, f"done ({result_words(receipt)})")
        return
    raise failure(stage.name, directory, attempt)


def failure(name: str, directory: StageDirectory, attempt: int) -> GreenMoEError:
    """Why an attempt has no receipt: the most telling of what its ranks recorded."""
    ends = attempt_ends(directory, attempt)
    stopped = [row for row in ends if row["outcome"] == "stopped"]
    failed = sorted(
        (row for row in ends if row["outcome"] == "failed"), key=lambda row: row["exit_code"] == StageError.exit_code
    )
    if failed:
        row = failed[0]
        log = f" (log: {directory.jobs}, rank {row['rank']})" if row["exit_code"] == StageError.exit_code else ""
        return error_by_exit_code(row["exit_code"], f"stage {name!r}: {row['message']}{log}")
    if is_full(directory.root):
        return full_disk(directory.root)
    spent = [row for row in stopped if row["exit_code"] == BudgetSpent.exit_code]
    if spent:
        return BudgetSpent(f"stage {name!r}: {min(spent, key=lambda row: row['rank'])['message']}")
    if stopped:
        return Stopped(f"stage {name!r}: {stopped[0]['message']}; run the same command to go on")
    return StageError(
        f"stage {name!r}: its processes ended without a word (killed, or out of memory?); see the logs in "
        f"{directory.jobs}, then run the same command to go on from the last checkpoint"
    )


def stage_plan(plan: Plan, stage: Stage) -> StagePlan:
    """The plan of one stage."""
    return next(planned for planned in plan.stages if planned.name == stage.name)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Signals that asked this launcher to stop, in order; SIGINT and SIGTERM are taken over while the block runs."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
