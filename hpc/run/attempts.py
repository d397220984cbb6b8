"""Append-only record of every attempt of a stage, successful or not, and the lock that keeps two of them apart."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from hpc.errors import BusyError
from hpc.run.directory import StageDirectory, append_jsonl, read_jsonl, storage_errors

Outcome = Literal["done", "stopped", "failed"]


def count_attempts(directory: StageDirectory) -> int:
    """Attempts that were started so far."""
    return sum(row.get("event") == "start" for row in read_jsonl(directory.attempts))


def record_start(directory: StageDirectory, attempt: int, world_size: int) -> None:
    """Note that an attempt begins (rank 0 of it, once)."""
    append_jsonl(
        directory.attempts,
        {"event": "start", "attempt": attempt, "time": time.time(), "host": socket.gethostname(), "ranks": world_size},
    )


def record_end(
    directory: StageDirectory, attempt: int, rank: int, outcome: Outcome, exit_code: int = 0, message: str = ""
) -> None:
    """Note how an attempt ended on one rank."""
    append_jsonl(
        directory.attempts,
        {
            "event": "end", "attempt": attempt, "rank": rank, "time": time.time(), "outcome": outcome,
            "exit_code": exit_code, "message": message,
        },
    )  # fmt: skip


def attempt_ends(directory: StageDirectory, attempt: int) -> list[dict[str, Any]]:
    """How the ranks of one attempt ended, as far as they could say it, in the order of time."""
    rows = [row for row in read_jsonl(directory.attempts) if row.get("event") == "end" and row["attempt"] == attempt]
    return sorted(rows, key=lambda row: float(row["time"]))


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
