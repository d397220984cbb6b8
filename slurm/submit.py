"""The door to submitit: one job per stage, on this machine or on Slurm; the same task runs in both."""

import glob
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from submitit import JobEnvironment, LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError
from submitit.local.local import LocalJob

from hpc.config import Machine
from hpc.errors import ConfigError, SiteError
from hpc.run.attempts import Job
from hpc.run.directory import RunDirectory, StageDirectory, storage_errors
from hpc.run.task import World
from slurm.commands import told
from slurm.jobs import JobSpec, python, setup_lines, teardown_lines
from slurm.site import Site

LONG_MINUTES = 60 * 24 * 30
"""submitit's local executor stops a job after two minutes unless told otherwise."""


RANK_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_MAX_": "0",  # with the next one: keep pages, faults on fresh gradients are slow
    "MALLOC_TRIM_THRESHOLD_": str(2**37),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # huge pages for them (glibc >= 2.35): 6 to 10 % with 64 experts
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
}
"""What every rank runs with, wherever it runs."""


@dataclass(frozen=True)
class LocalStage:
    """A stage that runs on this machine."""

    job: "LocalJob[str]"

    @property
    def is_running(self) -> bool:
        """Whether any of its processes is left."""
        return not self.job.done()

    def request_stop(self) -> None:
        """Ask all ranks to save and end; submitit's controller passes the signal on."""
        if self.job._process is not None and self.is_running:
            self.job._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all ranks at once."""
        try:
            controller = psutil.Process(int(self.job.job_id))
            family = [*controller.children(recursive=True), controller]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


def submit_local(task: Callable[[], str], directory: StageDirectory, ranks: int, machine: Machine) -> LocalStage:
    """Start `task` (picklable) on every rank of a job on this machine. Raises StorageError."""
    gpus = count_accelerators() if machine.device != "cpu" else 0
    if machine.device == "cuda" and gpus < ranks:
        raise ConfigError(
            f"machine.device is cuda with {ranks} ranks, but {gpus} accelerators are here: take device auto"
        )
    with storage_errors(directory.jobs):
        executor = LocalExecutor(folder=directory.jobs)
        executor.update_parameters(
            tasks_per_node=ranks, nodes=1, timeout_min=LONG_MINUTES, gpus_per_node=ranks if gpus >= ranks else 0
        )
        with _environment(directory), _terminal_signals_ignored():
            job = executor.submit(task)
    assert isinstance(job, LocalJob)
    return LocalStage(job)


def current_world(token: str) -> tuple[World, Job]:
    """Ranks and job of this process, from submitit's environment, exported in the names that torch and DeepSpeed read.

    `Job.job` is empty on one machine. What a killed attempt left half written in submitit's folder is removed.
    """
    environment = JobEnvironment()
    environment.paths.result_pickle.with_suffix(".pkl.save_tmp").unlink(missing_ok=True)
    on_slurm = environment.cluster == "slurm"
    node = os.environ.get("SLURMD_NODENAME", "") if on_slurm else ""
    world = World(
        rank=environment.global_rank,
        size=environment.num_tasks,
        local_rank=environment.local_rank,
        local_size=environment.num_tasks // environment.num_nodes,
        node=node or socket.gethostname(),
    )
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.local_size),
        CROSS_RANK=str(environment.node),
        CROSS_SIZE=str(environment.num_nodes),
        LOCAL_SIZE=str(world.local_size),
    )
    if not on_slurm:
        return world, Job(token)
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return world, Job(token, os.environ["SLURM_JOB_ID"], restart, tuple(environment.hostnames))


def count_accelerators() -> int:
    """GPUs that this machine has, without loading a library."""
    return len(glob.glob("/dev/nvidia[0-9]*")) or len(
        glob.glob("/dev/dri/renderD*") if os.path.exists("/dev/kfd") else []
    )


@contextmanager
def _environment(directory: StageDirectory) -> Iterator[None]:
    """The environment of the ranks while they are started."""
    values = {
        **RANK_ENVIRONMENT,
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(directory.jobs / "torch_extensions"),
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _terminal_signals_ignored() -> Iterator[None]:
    """Ctrl-C reaches the whole process group; submitit's controller would kill its ranks before they can save.

    A child that starts with SIGINT ignored keeps it so: only the launcher hears Ctrl-C, and asks for a stop.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Executor(SlurmExecutor):  # type: ignore[misc]  # submitit has no types
    """Writes job scripts on machines without Slurm too (dry run); submitting there fails with sbatch's absence."""

    @classmethod
    def affinity(cls) -> int:
        """As if srun were here."""
        return 2


def slurm_executor(spec: JobSpec, site: Site, run: RunDirectory, code: Path) -> SlurmExecutor:
    """submitit's executor for one job or array."""
    assert site.slurm is not None
    scheduler = site.slurm
    executor = _Executor(folder=run.jobs, python=python(site))
    options: dict[str, Any] = {
        "kill-on-invalid-dep": "yes",
        "requeue": True,
        "chdir": str(code),
        **scheduler.options,
    }
    if spec.memory_per_node is not None:
        options["mem"] = spec.memory_per_node
    gpus, srun_options = scheduler.gpus_per_node, ["--kill-on-bad-exit=1", *scheduler.srun_options]
    if gpus and scheduler.gpu_request == "gres":
        options["gres"] = f"gpu:{gpus}"
    if gpus and scheduler.gpu_request == "gpus":
        options["gpus"] = gpus * spec.nodes
    if scheduler.tasks_in_step:
        srun_options += [f"--ntasks-per-node={spec.tasks_per_node}", f"--cpus-per-task={spec.cpus_per_task or 1}"]
    values: dict[str, Any] = {
        "job_name": spec.name,
        "partition": spec.partition,
        "qos": spec.qos,
        "account": scheduler.account,
        "constraint": scheduler.constraint,
        "time": spec.time_limit_min,
        "nodes": spec.nodes,
        "ntasks_per_node": None if scheduler.tasks_in_step else spec.tasks_per_node,
        "cpus_per_task": None if scheduler.tasks_in_step else spec.cpus_per_task,
        "gpus_per_node": gpus if scheduler.gpu_request == "gpus-per-node" else None,
        "exclusive": True if scheduler.exclusive else None,
        "exclude": ",".join(spec.exclude) or None,
        "dependency": spec.dependency,
        "comment": spec.comment or None,
        "array_parallelism": scheduler.array_parallelism,
        "signal_delay_s": scheduler.signal_before_end_s,
        "setup": setup_lines(site, code, RANK_ENVIRONMENT, spec.cpus_per_task),
        "teardown": teardown_lines(site, run, spec.stages) if spec.is_stage else [],
        "srun_args": srun_options,
        "additional_parameters": options,
    }
    given = {name: value for name, value in values.items() if value is not None}
    executor.update_parameters(**given, wckey=None)  # submitit's own wckey is refused by sites that check them
    return executor


def script_text(spec: JobSpec, site: Site, run: RunDirectory, code: Path) -> str:
    """The very text that sbatch is given."""
    executor = slurm_executor(spec, site, run, code)
    if len(spec.stages) > 1:
        executor.parameters["map_count"] = len(spec.stages)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def submit_slurm(
    spec: JobSpec, site: Site, run: RunDirectory, code: Path, tasks: Sequence[Callable[[], Any]]
) -> list[str]:
    """Submit one task for each stage of a job; returns the ids, in order. Raises SiteError in sbatch's words."""
    with storage_errors(run.jobs):
        run.jobs.mkdir(parents=True, exist_ok=True)
    executor = slurm_executor(spec, site, run, code)
    try:
        jobs = executor.submit_array(list(tasks)) if len(tasks) > 1 else [executor.submit(tasks[0])]
    except FailedJobError as error:
        raise SiteError(f"sbatch refused {spec.name!r}: {told(str(error))}") from None
    return [str(job.job_id) for job in jobs]
