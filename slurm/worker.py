"""The first code in each task: environment -> world -> stage; signals; the sampler; attempts; the receipt.

submitit unpickles a `StageTask` in every process of a job and calls it. torch is imported after the environment is
set, and only by stages that need it.
"""

import os
import shutil
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import Popen
from typing import Any

from hpc.energy.ledger import power_series, stage_energy
from hpc.energy.sampler import start_sampler, stop_sampler
from hpc.errors import GreenMoEError, StageError, Stopped, StorageError
from hpc.run.attempts import exclusive, record_end, record_start
from hpc.run.directory import NO_SPACE, StageDirectory, full_disk, is_full
from hpc.run.receipt import Receipt, code_version, digest, list_files, write_receipt
from hpc.run.task import Context, Result, StopRequest, TaskFile, asked
from hpc.stages import stage_function
from hpc.tracking.wandb import Mirror
from slurm.submit import current_world


@dataclass(frozen=True)
class StageTask:
    """What a job runs: one attempt of one stage. Picklable; everything else is in task.json."""

    directory: str
    attempt: int

    def __call__(self) -> str:
        """Run the attempt on this rank; returns 'done' or 'stopped'. Raises what the stage raised."""
        stop = StopRequest()
        os.umask(0o077)
        directory = StageDirectory(Path(self.directory))
        world = current_world()
        sampler = None
        try:
            stop.listen()
            context = Context(TaskFile.read(directory.task), directory, world, self.attempt, stop)
            with exclusive(directory.lock, f"stage {context.task.stage.name!r}") if world.is_first else nullcontext():
                if world.is_first:
                    record_start(directory, self.attempt, world.size)
                if world.local_rank == 0:
                    power_model = context.task.machine.power.model_dump_json()
                    sampler = start_sampler(directory.root, os.getpid(), self.attempt, power_model)
                return self._run(context, sampler)
        except Stopped as stopped:
            record_end(directory, self.attempt, world.rank, "stopped", stopped.exit_code, str(stopped))
            return "stopped"
        except BaseException as error:
            told = explain_failure(error, directory.root)
            with suppress(StorageError):  # a disk too full for this line: the launcher looks at the disk itself
                record_end(directory, self.attempt, world.rank, "failed", told.exit_code, str(told))
            raise
        finally:
            if sampler is not None:
                stop_sampler(sampler)

    def _run(self, context: Context, sampler: "Popen[bytes] | None") -> str:
        began = time.monotonic()
        if context.world.is_first:
            for leftover in (context.directory.artifact, *context.directory.root.glob(".artifact*")):
                shutil.rmtree(leftover, ignore_errors=True)
            context.progress("checking inputs")
            context.verify_inputs()
        mirror = start_mirror(context) if context.world.is_first else Mirror()
        try:
            result = stage_function(context.task.stage.kind)(replace(context, mirror=mirror))
            self._finish(context, result, sampler, mirror, began)
        except BaseException:
            mirror.finish(exit_code=1)
            raise
        return "done"

    def _finish(
        self, context: Context, result: Result, sampler: "Popen[bytes] | None", mirror: Mirror, began: float
    ) -> None:
        """Receipt, W&B summary, attempt record: rank 0 only, in this order."""
        if context.world.is_first:
            context.progress("hashing the artifact")
            files = list_files(context.directory.artifact)
            if sampler is not None:
                stop_sampler(sampler)  # its last sample belongs to the receipt
            receipt = make_receipt(context, result, files, time.monotonic() - began)
            write_receipt(context.directory, receipt)
            context.progress("done")
            if not context.directory.metrics.exists():
                log_power(context, mirror)
            mirror.summary({**receipt.metrics, "energy_j": receipt.energy["energy_j"], "seconds": receipt.seconds})
            mirror.finish()
            record_end(context.directory, context.attempt, 0, "done")


def start_mirror(context: Context) -> Mirror:
    """The W&B run of this stage; every attempt with the same inputs and configuration goes on in the same one."""
    task, wanted = context.task, asked(context.task.stage, context.task.seed)
    return Mirror.start(
        task.tracking,
        chain=task.run,
        stage=task.stage.name,
        kind=task.stage.kind,
        folder=context.directory.root,
        identity=f"{task.run_directory} {task.stage.name} {digest(wanted)} {digest(task.inputs)}",
        config={"run": task.run, "stage": wanted, "inputs": task.inputs},
    )


def log_power(context: Context, mirror: Mirror) -> None:
    """Watts and joules of a stage that logs no steps of its own, one row a second of the last attempt."""
    series = [row for row in power_series(context.directory.root) if row[2] == context.attempt]
    joules = 0.0
    for number, (when, host, _, watts) in enumerate(series):
        joules += watts * (when - series[number - 1][0]) if number else 0.0
        mirror.log({"step": number, "node_power_w": {host: watts}, "energy_j": joules})


def make_receipt(context: Context, result: Result, files: list[dict[str, Any]], seconds: float) -> Receipt:
    """Put together what the stage did, what it left behind and what it drew."""
    energy, tokens = stage_energy(context.directory.root), result.metrics.get("tokens")
    return Receipt(
        stage=context.task.stage.name,
        kind=context.task.stage.kind,
        config=asked(context.task.stage, context.task.seed),
        inputs=context.task.inputs,
        files=files,
        metrics=result.metrics,
        provenance=result.provenance,
        energy={
            "energy_j": energy.energy_j,
            "provenance": energy.provenance,
            "sampled_s": energy.duration_s,
            "j_per_token": energy.energy_j / tokens if tokens and energy.energy_j is not None else None,
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


def explain_failure(error: BaseException, folder: Path) -> GreenMoEError:
    """The error as the user should see it: a full disk says so, whatever library met it; a crash names the log."""
    if isinstance(error, GreenMoEError):
        return error
    if NO_SPACE in str(error) or is_full(folder):
        return full_disk(folder)
    if isinstance(error, KeyboardInterrupt):
        return Stopped("interrupted")
    return StageError(f"{type(error).__name__}: {error}".splitlines()[0])
