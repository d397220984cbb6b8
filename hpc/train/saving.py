"""One save of one rank, in a thread: copy, write and hash, tell what was written; rank 0's publishes when all did.

    .staging-step-00000100-3-1/     step, attempt, and which save of the attempt; made by rank 0 if there is room
        fragments-00002.safetensors ...
        part-00002.json             what rank 2 wrote: path, size and XXH3-128 of its files, written last

No collective runs in a thread: ranks meet in the staging folder. A rank that cannot write tells the others through the
main threads (`Checkpoints.wait`); one that died leaves silence there, and silence is bounded.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc.errors import GreenMoEError, StorageError
from hpc.run.directory import storage_errors, write_json
from hpc.run.task import World
from hpc.train.written import Written

Write = Callable[[Path], list[Written]]
"""Writes this rank's files of a checkpoint into a folder."""
Copy = Callable[[], Write]
"""Copies what the next update would change, and returns what writes it."""

SILENCE_S = 600.0
"""How long nothing may change in the staging folder while a rank waits there for another."""
HURRY_S = 15.0
"""The same when this rank is about to end: others may be dead already."""
POLL_S = (0.005, 1.0)
"""First and longest pause between two looks at the folder."""


@dataclass(frozen=True)
class Problem:
    """Why a save failed, as it is told to the other ranks."""

    exit_code: int | None
    """Of an error that a user can cause; None for any other."""
    text: str
    is_echo: bool
    """Whether another rank gave up first, and knows why."""


class GivenUp(Exception):
    """Another rank could not do its part of a save."""


class Save(threading.Thread):
    """A save that runs beside training. `copied` is set once the state it saves may change again."""

    def __init__(
        self,
        staging: Path,
        world: World,
        copy: Copy,
        check_space: Callable[[], None],
        publish: Callable[[Path, list[Written]], None],
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.staging, self.world, self.patience_s = staging, world, SILENCE_S
        self.copied = threading.Event()
        self.is_given_up = False
        """Set by the main thread when it hears that another rank failed."""
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._copy, self._check_space, self._publish = copy, check_space, publish

    def run(self) -> None:
        """Copy and write; on rank 0, see it published."""
        began = time.monotonic()
        try:
            with storage_errors(self.staging):
                self._save()
        except BaseException as error:
            self.error = error
        finally:
            self.copied.set()
            self.seconds = time.monotonic() - began

    def _save(self) -> None:
        write = self._copy()
        self.copied.set()
        if self.world.is_first:
            self._check_space()
            self.staging.mkdir(parents=True)
        else:
            self._wait_for(self.staging, "rank 0 did not begin it")
        files = write(self.staging)
        write_json(part_path(self.staging, self.world.rank), [asdict(file) for file in files])
        if self.world.is_first:
            self._publish(self.staging, [file for rank in range(self.world.size) for file in self._part(rank)])

    def _part(self, rank: int) -> list[Written]:
        """What a rank wrote, once it says so."""
        path = part_path(self.staging, rank)
        self._wait_for(path, f"rank {rank} did not finish its part")
        found = [Written(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
        path.unlink()
        return found

    def _wait_for(self, path: Path, problem: str) -> None:
        """Wait for another rank's sign: as long as the folder grows, and then as long as patience lasts."""
        size, since, pause = -1, time.monotonic(), POLL_S[0]
        while not path.exists():
            if self.is_given_up:
                raise GivenUp
            if (now := _size(self.staging)) != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > self.patience_s:
                raise StorageError(
                    f"the save in {self.staging} was given up: {problem}, and nothing was written for "
                    f"{self.patience_s:.0f} s; is this folder shared by all nodes, and is it up?"
                )
            time.sleep(pause)
            pause = min(1.3 * pause, POLL_S[1])

    def problem(self) -> Problem | None:
        """What kept this rank from doing its part."""
        if self.error is None:
            return None
        code = self.error.exit_code if isinstance(self.error, GreenMoEError) else None
        text = str(self.error) if code is not None else f"{type(self.error).__name__}: {self.error}"
        return Problem(code, text, isinstance(self.error, GivenUp))


def part_path(staging: Path, rank: int) -> Path:
    """Where a rank says what it wrote."""
    return staging / f"part-{rank:05d}.json"


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(folder: Path) -> int:
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                total += 1 + entry.stat().st_size
    except OSError:  # a file, or all of it, is being renamed
        return total
    return total


def free_bytes(folder: Path) -> int:
    """Bytes that we may still write where `folder`, or the nearest of its parents that exists, is."""
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
