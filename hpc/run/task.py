"""What the launcher tells a worker, and what a stage has in its hands while it runs."""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, TypeAdapter

from hpc.config import Artifact, Facility, Machine, Stage, Tracking
from hpc.config.base import Frozen
from hpc.errors import ArtifactError, Fenced, StageError, Stopped
from hpc.run.attempts import Fence
from hpc.run.directory import StageDirectory, write_atomic, write_json
from hpc.run.receipt import Receipt, read_receipt, verify
from hpc.run.timeline import Phase, enter


class TaskFile(Frozen):
    """task.json: everything one stage needs to know. Paths are absolute; the worker may run in any folder."""

    run: str
    """Name of the run."""
    run_directory: str
    """Root of the run directory."""
    stage: Stage
    """What is to be done."""
    stages: list[Stage]
    """The whole chain, for the report and for lineage."""
    inputs: dict[str, str]
    """Stage name -> digest of its artifact when this task was written."""
    seed: int
    """Seed of the run."""
    tracking: Tracking
    """Where metrics are mirrored to."""
    machine: Machine
    """What the stage runs on."""
    facility: Facility
    """The building, as far as the site states it."""
    ranks: int = Field(ge=1)
    """Worker processes."""
    retries: int = Field(default=0, ge=0)
    """How often a crash is tried again by the job itself."""
    network_interface: str | None = None
    """Interface that the ranks talk over; None: the first one with an address."""
    nodes: int = Field(ge=1)
    """Nodes."""
    energy_budget_kwh: float | None = None
    """What all stages of the run together may draw."""

    def write(self, path: Path) -> None:
        """Publish the task. Raises StorageError."""
        write_atomic(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "TaskFile":
        """Read a task that `write` wrote."""
        return TypeAdapter(cls).validate_json(path.read_text(encoding="utf-8"))


SEEDED = ("pretrain", "finetune", "relora", "lora", "evaluate", "reuse")
"""Kinds of stages whose result depends on the seed of the run."""
NOT_ASKED = {"needs", "gate", "resources", "array", "workers", "energy_budget_kwh"}
"""Keys of a stage that its result does not depend on."""


def asked(stage: Stage, seed: int) -> dict[str, Any]:
    """What a stage's result depends on besides its inputs: its configuration, and the seed where one is used."""
    config: dict[str, Any] = stage.model_dump(mode="json", exclude=NOT_ASKED)
    return {**config, "seed": seed} if stage.kind in SEEDED else config


LAYOUT = {"parallel", "precision", "expert_compute", "attention_kernel", "recompute", "compile",
          "deepspeed", "checkpoint_every_steps", "keep_checkpoints",
          "keep_every_steps", "checkpoint_async",
          "evaluate_every_steps", "evaluate_tokens", "health"}  # fmt: skip
"""Keys of a training stage that say where and how it computes, not what."""


def asked_to_learn(stage: Stage, seed: int) -> dict[str, Any]:
    """`asked` without what may change between two attempts: a stage goes on from its checkpoint on other ranks."""
    config = asked(stage, seed)
    if "train" in config:
        config["train"] = {key: value for key, value in config["train"].items() if key not in LAYOUT}
        config["train"]["batches"] = {k: v for k, v in config["train"]["batches"].items() if k != "micro_batch_size"}
    return config


@dataclass
class StopRequest:
    """Set by signals on any rank. Training defers it to a step boundary; elsewhere it ends the stage at once."""

    requested: bool = False
    deferred: bool = False
    deadline: float | None = None
    """When the scheduler will end the job, seconds since the epoch; None without a limit. Known on rank 0."""

    def runs_out(self, seconds_needed: float) -> bool:
        """Whether that much time is no longer left before the deadline."""
        return self.deadline is not None and time.time() + seconds_needed > self.deadline

    def immediately(self) -> None:
        """From now on a request ends the stage at once; one that came before does so now. Raises Stopped."""
        self.deferred = False
        if self.requested:
            raise Stopped("stopped after the last step; what is left starts again from its checkpoint")

    def listen(self) -> None:
        """Take SIGTERM, SIGINT and SIGUSR2 as requests to stop, in place of submitit's own handlers."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._set)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _set(self, *_: object) -> None:
        self.requested = True
        if not self.deferred:
            raise Stopped("stopped before the stage was done; it starts again with the next run")


@dataclass(frozen=True)
class World:
    """The processes of one attempt. Filled from the job's environment before torch is imported."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: str = ""
    """Name of this node, as the scheduler knows it."""

    @property
    def is_first(self) -> bool:
        """Rank 0 writes what is written once."""
        return self.rank == 0


class Limit(Protocol):
    """Something that a stage may use up (hpc.energy.budget)."""

    def spent(self) -> str | None:
        """Why it is used up, in words; None while it is not."""
        ...

    def check(self) -> None:
        """Raises BudgetSpent when it is."""
        ...


@dataclass(frozen=True)
class Context:
    """What a stage works with: its task, its folder, its ranks, a way to be stopped and a way to say where it is."""

    task: TaskFile
    directory: StageDirectory
    world: World
    attempt: int
    stop: StopRequest = field(default_factory=StopRequest)
    fence: Fence | None = None
    """Asked before anything is published; None where no other attempt can come up."""
    budget: Limit | None = None
    """The energy that may be drawn; rank 0's, where there is one."""

    def phase(self, phase: Phase, step: int | None = None) -> None:
        """Say what begins now, for the timeline (hpc.run.timeline)."""
        if self.world.is_first:
            enter(self.directory, self.attempt, phase, step)

    def check_budget(self) -> None:
        """Raises BudgetSpent when no more energy may be drawn. For stages of one rank, between pieces of work."""
        if self.budget is not None:
            self.budget.check()

    def input_directory(self, name: str) -> StageDirectory:
        """Folder of a stage this one needs."""
        return StageDirectory(Path(self.task.run_directory) / "stages" / name)

    def input_receipt(self, name: str) -> Receipt:
        """Receipt of a stage this one needs. Raises ArtifactError when it has none."""
        receipt = read_receipt(self.input_directory(name))
        if receipt is None:
            raise ArtifactError(f"stage {self.task.stage.name!r} needs {name!r}, which has no receipt: run it first")
        return receipt

    def verify_inputs(self) -> None:
        """Hash everything this stage is about to read. Raises ArtifactError that names a damaged file."""
        for name in self.task.stage.needs:
            verify(self.input_directory(name), self.input_receipt(name))

    def inputs(self, *artifacts: str) -> list[tuple[str, Path]]:
        """(name, artifact folder) of the needed stages that produce one of `artifacts`, in the order of `needs`."""
        by_name = {stage.name: stage for stage in self.task.stages}
        return [
            (name, self.input_directory(name).artifact)
            for name in self.task.stage.needs
            if by_name[name].produces in artifacts
        ]

    def input_files(self, artifact: Artifact) -> dict[str, str]:
        """STAGE/FILE -> size and hash, of every file that the needed stages producing `artifact` left, as it was
        verified against their receipts when the attempt began."""
        return {
            f"{name}/{file['path']}": f"{file['bytes']:,} bytes with SHA-256 {file['sha256'][:16]}"
            for name, _ in self.inputs(artifact)
            for file in self.input_receipt(name).files
        }

    def check_fence(self) -> None:
        """Raises Fenced when a newer attempt has taken over."""
        if self.fence is not None and self.fence.is_superseded():
            raise Fenced(f"attempt {self.attempt} of {self.task.stage.name!r} was superseded by a newer one")

    def progress(self, text: str, *, done: float | None = None, total: float | None = None, **figures: Any) -> None:
        """Say where the stage is, for the live view: a phrase, a fraction, and figures such as loss."""
        if self.world.is_first:
            now = {"attempt": self.attempt, "time": time.time(), "text": text, "done": done, "total": total, **figures}
            write_json(self.directory.progress, now)


@dataclass(frozen=True)
class Result:
    """What a stage leaves for its receipt, returned by rank 0."""

    metrics: dict[str, Any]
    provenance: dict[str, str]
    census: dict[str, Any] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    """Packages whose versions belong in the receipt."""
    afterwards: Callable[[], None] = lambda: None
    """What every rank does once the receipt is written, such as deleting what only an unfinished stage needs."""


def read_progress(directory: StageDirectory) -> dict[str, Any]:
    """The last word of the running attempt; empty when there is none."""
    try:
        value = json.loads(directory.progress.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(value, dict):
        raise StageError(f"{directory.progress} does not hold an object")
    return value
