"""The energy file of a node, held by one sampler at a time, and the other samplers on the same node.

* Two samplers on one file would count a node twice. The one that writes holds a lock on the file; a second one of the
  same attempt goes away, one of a newer attempt tells the older to end and takes over (its process may hang).
* Two stages on one node would each count the whole node. Samplers of one user find each other by locked files in the
  node's temporary folder, and each takes its part of every interval: 1/n while n of them run. (Jobs whose /tmp is
  their own cannot see each other, nor can different users; then the sampler only says that the node is shared.)
* A disk that is full, or a file system that is away, costs rows and never the sampler: energy is cumulative, so the
  next row that can be written holds everything.
"""

import errno
import fcntl
import hashlib
import json
import os
import signal
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from hpc.run.directory import ends_torn, read_jsonl

UNLOCKABLE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without locks answer (Lustre mounted without `flock`)."""

PATIENCE_S = 2.0
"""How long a sampler of an older attempt may take to end before it is killed."""


class SampleFile:
    """Append-only JSON lines that a full disk cannot break."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def append(self, row: dict[str, Any]) -> bool:
        """Write one line; False when it could not be. A line that was cut is ended before the next one."""
        try:
            if self._handle is None:
                self._open()
            assert self._handle is not None
            line = json.dumps(row).encode() + b"\n"
            if os.write(self._handle, line) == len(line):
                return True
        except OSError:
            pass
        self._close()
        return False

    def claim(self, attempt: int) -> str | None:
        """Be the only sampler of this file. None when another one is at work on this attempt or a newer one; else a
        note, mostly empty."""
        try:
            if self._lock():
                return ""
            starts = [row for row in read_jsonl(self._path) if row.get("event") == "start"]
            number_of_older, pid = (starts[-1]["attempt"], starts[-1]["pid"]) if starts else (0, 0)
            if number_of_older >= attempt:
                return None
            for number in (signal.SIGINT, signal.SIGKILL):
                _signal_sampler(pid, number, self._path)
                deadline = time.monotonic() + PATIENCE_S
                while time.monotonic() < deadline:
                    if self._lock():
                        return f"took over from the sampler of attempt {number_of_older}, which was still running"
                    time.sleep(0.02)
        except OSError as error:
            return "" if error.errno in UNLOCKABLE else f"no lock on the energy file: {error}"
        return f"the sampler of attempt {number_of_older} (process {pid}) cannot be ended: its rows go on beside these"

    def _lock(self) -> bool:
        if self._handle is None:
            self._open()
        assert self._handle is not None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _open(self) -> None:
        self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # after an error the lock went with the old handle
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if ends_torn(self._path) and os.write(self._handle, b"\n") != 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _close(self) -> None:
        if self._handle is not None:
            with suppress(OSError):
                os.close(self._handle)
            self._handle = None


def _signal_sampler(pid: int, number: int, path: Path) -> None:
    """Signal a process if it is the sampler of this file (its number may belong to somebody else by now)."""
    with suppress(psutil.Error, ProcessLookupError, ValueError):
        process = psutil.Process(pid)
        node = path.stem.removeprefix("energy-")
        if {"hpc.energy.sampler", str(path.parent), node} <= set(process.cmdline()):
            process.send_signal(number)


class Neighbours:
    """The samplers of this user that read the same node's counters."""

    def __init__(self, node: str, root: Path) -> None:
        self._own: Path | None = None
        with suppress(OSError):
            folder = Path(tempfile.gettempdir()) / f"greenmoe-energy-{os.getuid()}"
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                return  # somebody else's: stay alone rather than trust it
            folder = folder / _identity(node, root)
            folder.mkdir(mode=0o700, exist_ok=True)
            name = uuid.uuid4().hex  # not the process number, which a container may give again
            staging = folder / f".{name}"
            self._lock = staging.open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._own = staging.rename(folder / name)

    def count(self) -> int:
        """Samplers at work here, this one included. What a killed one left is cleared away."""
        number = 1
        if self._own is None:
            return number
        with suppress(OSError):
            for name in os.listdir(self._own.parent):
                if name != self._own.name and not name.startswith("."):
                    number += self._is_alive(self._own.with_name(name))
        return number

    def leave(self) -> None:
        """Others need not share any more."""
        if self._own is not None:
            self._own.unlink(missing_ok=True)

    def _is_alive(self, path: Path) -> bool:
        with suppress(FileNotFoundError), path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            path.unlink(missing_ok=True)
        return False


def _identity(node: str, root: Path) -> str:
    """Names the counters that are read: two clusters rehearsed on one machine have nodes of the same name."""
    places = [root, root / "sys/cray/pm_counters", root / "sys/class/powercap"]
    marks = [(status.st_dev, status.st_ino) for status in (place.stat() for place in places if place.exists())]
    return hashlib.sha256(f"{node} {marks}".encode()).hexdigest()[:16]


class Shares:
    """Cumulative figures of which every interval is divided by the number of samplers then."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}
        self._ours: dict[str, float] = {}

    def take(self, name: str, total: float | None, share: float) -> float | None:
        """Our part of `total` so far, with `share` of what came since the call before."""
        if total is None:
            return None
        ours = self._ours.get(name, 0.0) + (total - self._seen.get(name, 0.0)) * share
        self._seen[name], self._ours[name] = total, ours
        return ours
