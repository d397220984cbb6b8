"""The first code in each task: environment -> world -> stage; signals; the sampler; attempts; the receipt.

submitit unpickles a `StageTask` in every process of a job and calls it. torch is imported after the environment is
set, and only by stages that need it.
"""

import hashlib
import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import Popen
from typing import Any

from hpc.config import RunConfig
from hpc.energy.budget import Budget
from hpc.energy.ledger import stage_ledger
from hpc.energy.sampler import start_sampler, stop_sampler
from hpc.errors import BudgetSpent, Fenced, GateMissed, GreenMoEError, StageError, Stopped, StorageError
from hpc.plan.fit import advice
from hpc.run.attempts import (
    Attempt,
    Fence,
    Job,
    Outcome,
    count_attempts,
    exclusive,
    failing_nodes,
    record_end,
    record_start,
    wait_for_start,
)
from hpc.run.directory import NO_SPACE, RunDirectory, StageDirectory, append_jsonl, full_disk, is_full, read_jsonl
from hpc.run.receipt import Receipt, code_version, digest, list_files, read_receipt, verify, write_receipt
from hpc.run.task import Context, Result, StopRequest, TaskFile, World, asked, asked_to_learn
from hpc.stages import stage_function
from hpc.tracking.mirror import Mirror
from hpc.tracking.ticket import Ticket
from slurm import commands
from slurm.network import free_port, own_address
from slurm.state import input_digests, missed_gate
from slurm.submit import current_world

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


@dataclass(frozen=True)
class StageTask:
    """What a job runs: one attempt of one stage. Picklable; everything else is in task.json."""

    directory: str
    token: str
    """Of the submission; all its attempts share it."""

    def __call__(self) -> str:
        """Run the attempt on this rank; returns 'done' or 'stopped'. Raises what the stage raised."""
        stop = StopRequest()
        os.umask(0o077)
        directory = StageDirectory(Path(self.directory))
        world, job = current_world(self.token)
        stop.listen()
        task = TaskFile.read(directory.task)
        attempt: Attempt | None = None
        sampler = None
        try:
            attempt = self._begin(directory, task, world, job)
            with _alone(directory, task, world, job):
                task = with_inputs(directory, task, world)
                fence = Fence(directory, attempt.number) if job.job else None
                context = Context(task, directory, world, attempt.number, stop, fence)
                if is_done(context):
                    record_end(directory, attempt.number, world.rank, "done", node=world.node)
                    return "done"
                check_gates(context)
                if attempt.over_budget:
                    raise BudgetSpent(f"{attempt.over_budget}; the stage was not begun: raise it to go on")
                if world.is_first and job.job:
                    stop.deadline = commands.end_time(commands.this_job())
                if world.local_rank == 0:
                    power_model = task.machine.power.model_dump_json()
                    sampler = start_sampler(directory.root, world.node, os.getpid(), attempt.number, power_model)
                return self._run(context, sampler)
        except BaseException as error:
            told, is_crash = explain_failure(error, directory.root, task)
            if stop.requested and not isinstance(told, Fenced):
                told, is_crash = told if isinstance(told, Stopped) else Stopped("stopped on request"), False
            outcome: Outcome = "stopped" if isinstance(told, Stopped) else "failed"
            with suppress(StorageError):  # a disk too full for this line: the launcher looks at the disk itself
                number = attempt.number if attempt else max(1, count_attempts(directory))
                record_end(
                    directory, number, world.rank, outcome, told.exit_code, str(told),
                    is_crash=is_crash, node=world.node,
                )  # fmt: skip
            if outcome == "stopped":
                return "stopped"
            raise
        finally:
            if sampler is not None:
                stop_sampler(sampler)

    def _begin(self, directory: StageDirectory, task: TaskFile, world: World, job: Job) -> Attempt:
        """Announce the attempt, or hear of it, and set the environment of the process group."""
        address, interface = own_address(task.network_interface, is_alone=task.nodes == 1)
        if world.is_first:
            note_lost_nodes(directory)
            attempt = record_start(
                directory, job, world.size, address, free_port(address),
                born=process_start(), over_budget=spent_before(directory, task),
            )  # fmt: skip
            shun_failing_nodes(directory, job)
        else:
            attempt = wait_for_start(directory, job)
        os.environ.update(MASTER_ADDR=attempt.address, MASTER_PORT=str(attempt.port))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if task.network_interface:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", task.network_interface)
        return attempt

    def _run(self, context: Context, sampler: "Popen[bytes] | None") -> str:
        began = time.monotonic()
        if context.world.is_first:
            for leftover in (context.directory.artifact, *context.directory.root.glob(".artifact*")):
                shutil.rmtree(leftover, ignore_errors=True)
            context.progress("checking inputs")
            context.verify_inputs()
        mirror = start_mirror(context) if context.world.is_first else Mirror()
        context = replace(context, budget=limit_of(context))
        if not hasattr(context.task.stage, "train"):  # the training loop tells its phases itself
            context.phase("productive")
        try:
            result = stage_function(context.task.stage.kind)(context)
            self._finish(context, result, sampler, mirror, began)
            result.afterwards()
        except BaseException as error:
            mirror.finish("stopped" if isinstance(error, Stopped) else "failed")
            raise
        world = context.world
        record_end(context.directory, context.attempt, world.rank, "done", node=world.node)
        return "done"

    def _finish(
        self, context: Context, result: Result, sampler: "Popen[bytes] | None", mirror: Mirror, began: float
    ) -> None:
        """Receipt, then the end of the W&B run, which reads it: rank 0 only."""
        if context.world.is_first:
            context.check_fence()
            context.progress("hashing the artifact")
            files = list_files(context.directory.artifact)
            if sampler is not None:
                stop_sampler(sampler)  # its last sample belongs to the receipt
            receipt = make_receipt(context, result, files, time.monotonic() - began)
            write_receipt(context.directory, receipt)
            context.phase("idle")
            shutil.rmtree(context.directory.shards, ignore_errors=True)
            context.progress("done")
            mirror.finish("done")


def _alone(directory: StageDirectory, task: TaskFile, world: World, job: Job) -> AbstractContextManager[None]:
    """On one machine a lock keeps two attempts apart. Under a scheduler the newest attempt wins (`Fence`): a lock
    would be held for ever by an attempt that hangs on a node nobody can reach."""
    if job.job or not world.is_first:
        return nullcontext()
    return exclusive(directory.lock, f"stage {task.stage.name!r}")


def with_inputs(directory: StageDirectory, task: TaskFile, world: World) -> TaskFile:
    """The task with the digests of what it reads now. What an attempt made from other inputs is moved aside."""
    run = RunDirectory(Path(task.run_directory))
    inputs = input_digests(run, task.stage)
    if inputs == task.inputs:
        return task
    fresh = task.model_copy(update={"inputs": inputs})
    if world.is_first:
        if any(task.inputs.values()):
            run.supersede(task.stage.name, attempt=count_attempts(directory))
        fresh.write(directory.task)
    return fresh


def is_done(context: Context) -> bool:
    """Whether a valid receipt for these very inputs is there. Only a requeue or a second submission meets one."""
    receipt = read_receipt(context.directory)
    task = context.task
    if receipt is None or receipt.inputs != task.inputs or receipt.config != asked(task.stage, task.seed):
        return False
    if context.world.is_first:
        verify(context.directory, receipt)
    return True


def spent_before(directory: StageDirectory, task: TaskFile) -> str | None:
    """Why an attempt must not even begin; None when it may."""
    same_inputs = input_digests(RunDirectory(Path(task.run_directory)), task.stage) == task.inputs
    return Budget(task, directory, count_attempts(directory) + 1, counts_earlier=same_inputs).spent()


def limit_of(context: Context) -> Budget | None:
    """The energy that this attempt may draw, where there is a limit and this rank watches it."""
    budget = Budget(context.task, context.directory, context.attempt) if context.world.is_first else None
    return budget if budget is not None and budget.is_limited else None


def check_gates(context: Context) -> None:
    """Raises GateMissed when an earlier receipt does not show what this stage demands."""
    missed = missed_gate(RunDirectory(Path(context.task.run_directory)), context.task.stage)
    if missed:
        raise GateMissed(missed)


def note_lost_nodes(directory: StageDirectory) -> None:
    """Record which nodes are down after an attempt that ended without a word."""
    rows = read_jsonl(directory.attempts)
    starts = [row for row in rows if row.get("event") == "start"]
    if not starts or not starts[-1]["nodes"]:
        return
    last = starts[-1]["attempt"]
    if any(row.get("event") in ("verdict", "node") and row["attempt"] == last for row in rows):
        return
    for node in commands.bad_nodes(starts[-1]["nodes"]):
        append_jsonl(directory.attempts, {"event": "node", "attempt": last, "time": time.time(), "node": node})


def shun_failing_nodes(directory: StageDirectory, job: Job) -> None:
    """Go back to the queue when this job was given a node that has failed twice under this chain."""
    chain = [StageDirectory(path) for path in directory.root.parent.iterdir() if path.is_dir()]
    shunned = sorted({*failing_nodes(chain)} & {*job.nodes})
    if shunned and commands.requeue(commands.this_job(), shunned) is None:
        raise Stopped(f"given back: {', '.join(shunned)} failed twice under this chain")


def process_start() -> float:
    """When this process began, seconds since the epoch: to a clock tick. (psutil goes by the time of boot that Linux
    tells in whole seconds; an attempt could begin before the last step of the one before.)"""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s


def start_mirror(context: Context) -> Mirror:
    """The W&B run of this stage; every attempt with the same inputs and configuration goes on in the same one."""
    task, mode = context.task, context.task.tracking.wandb
    if mode == "disabled":
        return Mirror()
    wanted = asked(task.stage, task.seed)
    learned = asked_to_learn(task.stage, task.seed)
    identity = f"{task.run_directory} {task.stage.name} {digest(learned)} {digest(task.inputs)}"
    ticket = Ticket(
        id=hashlib.sha256(identity.encode()).hexdigest()[:16],
        project=task.tracking.project,
        entity=task.tracking.entity,
        group=task.run,
        name=f"{task.run}/{task.stage.name}",
        kind=task.stage.kind,
        produces=task.stage.produces,
        has_steps="train" in wanted,
        mode=("online" if os.environ.get("WANDB_API_KEY") else "offline") if mode == "auto" else mode,
        config={"run": task.run, "stage": wanted, "lineage": lineage(context), "nodes": task.nodes, "ranks": task.ranks,
                "machine": task.machine.model_dump(mode="json"), "code": code_version()},
    )  # fmt: skip
    return Mirror.start(ticket, context.directory.root, context.attempt)


def lineage(context: Context) -> dict[str, Any]:
    """What each input of a stage is: kind, digest, and the W&B run that made it where there is one."""
    told = {}
    for name, known in context.task.inputs.items():
        root = context.input_directory(name).root
        run = Ticket.read(root).id if Ticket.path(root).exists() else None
        told[name] = {"kind": context.input_receipt(name).kind, "digest": known, "wandb_run": run}
    return told


def make_receipt(context: Context, result: Result, files: list[dict[str, Any]], seconds: float) -> Receipt:
    """Put together what the stage did, what it left behind and what it drew."""
    ledger, tokens = stage_ledger(context.directory.root, context.attempt), result.metrics.get("tokens")
    return Receipt(
        stage=context.task.stage.name,
        kind=context.task.stage.kind,
        config=asked(context.task.stage, context.task.seed),
        inputs=context.task.inputs,
        files=files,
        metrics=result.metrics,
        provenance=result.provenance,
        energy={
            "energy_j": ledger.energy_j,
            "lost_j": ledger.lost_j,
            "missing": list(ledger.missing),
            "provenance": list(ledger.provenance),
            "sampled_s": ledger.node_s,
            "j_per_token": ledger.energy_j / tokens if tokens and ledger.energy_j is not None else None,
        },
        code={**code_version(), **{name: library_version(name) for name in result.libraries}},
        seconds=seconds,
        attempts=context.attempt,
        census=result.census,
    )


def library_version(name: str) -> str | None:
    """Installed version of a package, None when it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def explain_failure(error: BaseException, folder: Path, task: TaskFile) -> tuple[GreenMoEError, bool]:
    """The error as the user should see it, and whether it is a crash that another attempt may not meet.

    A full disk says so, whatever library met it; running out of memory is no crash: it would happen again.
    """
    if isinstance(error, GreenMoEError):
        return error, False
    if NO_SPACE in str(error) or is_full(folder):
        return full_disk(folder), False
    if isinstance(error, KeyboardInterrupt):
        return Stopped("interrupted"), False
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in OUT_OF_MEMORY):
        return StageError(f"out of memory ({text}): {what_would_fit(task)}"), False
    return StageError(text), True


def what_would_fit(task: TaskFile) -> str:
    """A way out of a lack of memory. It must not fail itself: little is left."""
    try:
        return advice(RunConfig(name=task.run, stages=task.stages), task.machine, task.stage.name)
    except Exception:
        return "lower batches.micro_batch_size or take more ranks"
