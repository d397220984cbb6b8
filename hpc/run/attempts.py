"""Append-only record of every attempt of a stage, successful or not, and the lock that keeps two of them apart.

{"event": "start",   "attempt", "token", "time", "host", "ranks", "job", "restart", "nodes", "checkpoint",
                     "address", "port", "born", "over_budget"}     rank 0, once; the other ranks wait for it
{"event": "end",     "attempt", "rank", "time", "outcome", "exit_code", "message", "is_crash", "node"}   every rank
{"event": "verdict", "attempt", "time", "action", "reason", "checkpoint"}     what was decided after it (Slurm)
{"event": "node",    "attempt", "time", "node"}                               a node that failed under it
{"event": "submit",  "time"}                                                  on Slurm: it was submitted (again)
{"event": "superseded", "attempt", "time", "folder"}     attempts before this one are those of RUN/superseded/FOLDER
"""

import fcntl
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.errors import BusyError, StageError
from hpc.run.directory import StageDirectory, append_jsonl, read_jsonl, storage_errors

Outcome = Literal["done", "stopped", "failed"]
START_TIMEOUT_S = 300.0
"""How long a rank waits for rank 0 to start the attempt."""


@dataclass(frozen=True)
class Job:
    """The job that an attempt runs in."""

    token: str
    """Made at submission; tells an attempt from one of an earlier job that had the same id."""
    job: str = ""
    restart: int = 0
    """How often the scheduler has started this job again."""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """One attempt, as its rank 0 announced it."""

    number: int
    address: str
    port: int
    over_budget: str | None = None
    """Why it must not begin, as rank 0 found it: all ranks have to agree."""


def count_attempts(directory: StageDirectory) -> int:
    """Attempts that were started so far."""
    return sum(row.get("event") == "start" for row in read_jsonl(directory.attempts))


def record_start(
    directory: StageDirectory,
    job: Job,
    world_size: int,
    address: str,
    port: int,
    *,
    born: float | None = None,
    over_budget: str | None = None,
) -> Attempt:
    """Announce an attempt (rank 0 of it, once) with the meeting point of its ranks. born: when its process started."""
    number = count_attempts(directory) + 1
    append_jsonl(
        directory.attempts,
        {
            "event": "start", "attempt": number, "time": time.time(), "host": socket.gethostname(),
            "ranks": world_size, **asdict(job), "checkpoint": newest_step(directory), "address": address, "port": port,
            "born": born, "over_budget": over_budget,
        },
    )  # fmt: skip
    return Attempt(number, address, port, over_budget)


def wait_for_start(directory: StageDirectory, job: Job) -> Attempt:
    """The attempt that rank 0 of the same job announced. Raises StageError when it does not come."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        for row in reversed(read_jsonl(directory.attempts)):
            if row.get("event") == "start" and (row["token"], row["job"], row["restart"]) == (
                job.token, job.job, job.restart,
            ):  # fmt: skip
                return Attempt(row["attempt"], row["address"], row["port"], row["over_budget"])
        time.sleep(0.05)
    raise StageError(f"rank 0 did not start the attempt within {START_TIMEOUT_S:.0f} s: is {directory.root} shared?")


def record_end(
    directory: StageDirectory,
    attempt: int,
    rank: int,
    outcome: Outcome,
    exit_code: int = 0,
    message: str = "",
    *,
    is_crash: bool = False,
    node: str = "",
) -> None:
    """Note how an attempt ended on one rank. A crash is a failure that may be gone next time."""
    append_jsonl(
        directory.attempts,
        {
            "event": "end", "attempt": attempt, "rank": rank, "time": time.time(), "outcome": outcome,
            "exit_code": exit_code, "message": message, "is_crash": is_crash, "node": node,
        },
    )  # fmt: skip


def attempt_ends(directory: StageDirectory, attempt: int) -> list[dict[str, Any]]:
    """How the ranks of one attempt ended, as far as they could say it, in the order of time."""
    rows = [row for row in read_jsonl(directory.attempts) if row.get("event") == "end" and row["attempt"] == attempt]
    return sorted(rows, key=lambda row: float(row["time"]))


def newest_step(directory: StageDirectory) -> int:
    """Step of the newest published checkpoint, 0 when there is none."""
    steps = [int(path.name.removeprefix("step-")) for path in directory.checkpoints.glob("step-[0-9]*")]
    return max(steps, default=0)


def failing_nodes(directories: list[StageDirectory], at_least: int = 2) -> list[str]:
    """Nodes that failed so often under these stages that jobs should stay away from them."""
    counts: Counter[str] = Counter()
    for directory in directories:
        counts.update(row["node"] for row in read_jsonl(directory.attempts) if row.get("event") == "node")
    return sorted(node for node, count in counts.items() if count >= at_least)


@dataclass
class Fence:
    """Tells an attempt that a newer one has taken over, whatever the scheduler believes about its processes."""

    directory: StageDirectory
    attempt: int
    _size: int = -1

    def is_superseded(self) -> bool:
        """Whether a newer attempt was announced. Cheap: the record is read only when it has grown."""
        try:
            size = self.directory.attempts.stat().st_size
        except OSError:
            return False
        if size == self._size:
            return False
        newest = count_attempts(self.directory)
        self._size = size if newest <= self.attempt else -1
        return newest > self.attempt


@contextmanager
def exclusive(lock: Path, what: str) -> Iterator[None]:
    """Hold `lock` until the block ends or the process dies. Raises BusyError when somebody else holds it."""
    with storage_errors(lock):
        file = lock.open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BusyError(f"{what} is in use by {holder}: wait for it to end, or stop it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
