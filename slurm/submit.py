"""The door to submitit: one job per stage. Here the local executor; the same task goes to Slurm."""

import glob
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
from submitit import JobEnvironment, LocalExecutor
from submitit.local.local import LocalJob

from hpc.config import Machine
from hpc.errors import ConfigError
from hpc.run.directory import StageDirectory, storage_errors
from hpc.run.task import World

LONG_MINUTES = 60 * 24 * 30
"""submitit's local executor stops a job after two minutes unless told otherwise."""


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


def current_world() -> World:
    """Ranks of this process, from the scheduler's environment, exported in the names that torch and DeepSpeed read."""
    job = JobEnvironment()
    world = World(
        rank=job.global_rank,
        size=job.num_tasks,
        local_rank=job.local_rank,
        local_size=job.num_tasks // job.num_nodes,
    )
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.local_size),
        CROSS_RANK=str(job.node),
        CROSS_SIZE=str(job.num_nodes),
        LOCAL_SIZE=str(world.local_size),
    )
    return world


def count_accelerators() -> int:
    """GPUs that this machine has, without loading a library."""
    return len(glob.glob("/dev/nvidia[0-9]*")) or len(
        glob.glob("/dev/dri/renderD*") if os.path.exists("/dev/kfd") else []
    )


@contextmanager
def _environment(directory: StageDirectory) -> Iterator[None]:
    """The environment of the ranks. The allocator settings keep pages: faults on fresh gradients are slow."""
    values = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**37),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(directory.jobs / "torch_extensions"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
