"""Where everything of a run lies on disk, and how files get there: whole or not at all.

RUN/config.yaml            the configuration as it was given, resolved
RUN/plan.json              what runs
RUN/report.html            the last report
RUN/dashboard.json         the saved W&B workspace
RUN/site.yaml              on Slurm: the site that it was submitted to
RUN/submissions.jsonl      on Slurm: one line for each job
RUN/code/DIGEST/           on Slurm: the code that the jobs run
RUN/jobs/                  on Slurm: submitit's files, the logs of every job and rank
RUN/stages/STAGE/          one stage
    task.json              what the worker was told to do
    attempts.jsonl         one line when an attempt starts, one when it ends
    metrics.jsonl          one line per logged step: the truth that W&B mirrors
    timeline.jsonl         one line when the phase of an attempt changes
    energy-HOST.jsonl      one line per second and node
    progress.json          where the running attempt is
    origin.json            what it started from in other runs; users.jsonl: the runs that started from it
    hung-attempt-N         the rank that hung, and beside it stacks-attempt-N-rank-R.txt of every rank
    checkpoints/step-N/    published checkpoints, never changed once they are there
    shards/                what a stage that reads text has done so far
    artifact/              what the next stages read
    receipt.json           written last: the stage is done
    jobs/ wandb/           submitit's files and logs on this machine; W&B's files and what is known of its run
RUN/superseded/STAGE-N/    stages that a changed configuration made again
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.errors import StorageError

NO_SPACE = "No space left on device"
"""What every library quotes from the system when a disk is full, whatever type its exception has."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError on writing below `path` into one line with a way out."""
    try:
        yield
    except OSError as error:
        raise StorageError(storage_message(path, error)) from error


def storage_message(path: Path, error: OSError) -> str:
    """One line for an OSError: what could not be written, why, and what to change."""
    return f"cannot write {error.filename or path}: {error.strerror or error}; free some space or --set run_root=DIR"


def is_full(folder: Path) -> bool:
    """Whether the file system of `folder` has less than 64 KiB left for us."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    return status.f_bavail * status.f_frsize < 65536


def full_disk(folder: Path) -> StorageError:
    """What to tell when it is."""
    return StorageError(f"{NO_SPACE} while writing {folder}: free some space or --set run_root=DIR")


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, whatever happens. Raises StorageError."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with staging.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            staging.replace(path)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one line in one write, on a line of its own whatever a killed writer left. Raises StorageError."""
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with storage_errors(path), path.open("ab") as file:
        file.write(b"\n" + line if ends_torn(path) else line)


def ends_torn(path: Path) -> bool:
    """Whether the last line of a file has no end, because its writer was killed."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a file that may not exist; a torn last line (a killed writer) is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def file_sizes(root: Path) -> int:
    """Bytes of all files below `root`."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


@dataclass(frozen=True)
class StageDirectory:
    """The paths of one stage."""

    root: Path

    @property
    def task(self) -> Path:
        """What the worker was told to do."""
        return self.root / "task.json"

    @property
    def attempts(self) -> Path:
        """Append-only record of attempts."""
        return self.root / "attempts.jsonl"

    @property
    def metrics(self) -> Path:
        """Append-only metrics, one row per logged step."""
        return self.root / "metrics.jsonl"

    @property
    def timeline(self) -> Path:
        """Append-only record of what the running attempt was doing since when."""
        return self.root / "timeline.jsonl"

    @property
    def progress(self) -> Path:
        """Where the running attempt is, replaced about once a second."""
        return self.root / "progress.json"

    @property
    def checkpoints(self) -> Path:
        """Published checkpoints."""
        return self.root / "checkpoints"

    @property
    def shards(self) -> Path:
        """Work done by earlier attempts of a stage that reads text; gone once it has its receipt."""
        return self.root / "shards"

    @property
    def artifact(self) -> Path:
        """What later stages read."""
        return self.root / "artifact"

    @property
    def receipt(self) -> Path:
        """Proof that the stage is done."""
        return self.root / "receipt.json"

    @property
    def jobs(self) -> Path:
        """submitit's files and the logs of each rank."""
        return self.root / "jobs"

    @property
    def lock(self) -> Path:
        """Held by rank 0 of the running attempt."""
        return self.root / ".lock"


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run."""

    root: Path

    @classmethod
    def create(cls, run_root: Path, name: str) -> "RunDirectory":
        """Make RUN and check that it can be written. Readable by its owner only. Raises StorageError."""
        root = (run_root / name).absolute()
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe = root / f".probe-{os.getpid()}"
            probe.write_bytes(b"\0" * 65536)
            probe.unlink()
        return cls(root)

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def plan(self) -> Path:
        """The plan of the last launch."""
        return self.root / "plan.json"

    @property
    def report(self) -> Path:
        """The last report."""
        return self.root / "report.html"

    @property
    def lock(self) -> Path:
        """Held by the `launch.py run` that drives the chain."""
        return self.root / ".lock"

    def stage(self, name: str) -> StageDirectory:
        """The paths of one stage."""
        return StageDirectory(self.root / "stages" / name)

    def supersede(self, name: str, attempt: int | None = None) -> Path:
        """Move a stage aside, with all it spent, so that it can be made again. Returns where it went.

        From within an attempt, give its number: the record of attempts and the task stay where they are too, and a line
        in the record says that the attempts before this one went along.
        """
        number = 1
        while (target := self.root / "superseded" / f"{name}-{number}").exists():
            number += 1
        root = self.stage(name).root
        with storage_errors(target):
            target.parent.mkdir(exist_ok=True)
            if attempt is None:
                root.rename(target)
                return target
            stage = StageDirectory(root)
            row = {"event": "superseded", "attempt": attempt, "time": time.time(), "folder": target.name}
            append_jsonl(stage.attempts, row)
            target.mkdir()
            for path in list(root.iterdir()):
                if path in (stage.attempts, stage.task):
                    shutil.copyfile(path, target / path.name)
                else:
                    path.rename(target / path.name)
        return target

    @property
    def jobs(self) -> Path:
        """Slurm: submitit's files and the logs of every job and rank."""
        return self.root / "jobs"

    @property
    def submissions(self) -> Path:
        """Slurm: append-only record of what was submitted."""
        return self.root / "submissions.jsonl"

    @property
    def site(self) -> Path:
        """Slurm: the site that the chain was last submitted to."""
        return self.root / "site.yaml"
