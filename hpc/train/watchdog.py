"""A thread on every rank that ends an attempt in which nothing happens any more, and says where it stood still.

A rank that waits in a collective for one that is gone waits for minutes, and dies with a message that names neither.
Here every stretch of work has a bound (`train.health.hang`). A rank without progress for longer

* leaves a marker `hung-attempt-N` in the stage folder, which the other ranks look for once a second,
* writes the stacks of all its threads to its log and to `stacks-attempt-N-rank-R.txt`, as the others do then too,
* records its end with the exit code of `Hung`, and leaves by `os._exit`: nothing of Python can be waited for.

The thread runs while the main thread waits in a collective or in the kernel. It cannot while a library holds the
interpreter's lock: then a timer of `faulthandler`, which needs no lock, writes the stacks to the log, and the other
ranks end the attempt.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from hpc.config.train import HangBounds
from hpc.errors import Hung
from hpc.run.attempts import record_end
from hpc.run.directory import StageDirectory, write_json
from hpc.run.task import Context, World

Section = Literal["start", "step", "checkpoint", "evaluate", "finish"]
POLL_S = 1.0
"""Between two looks; costs one `stat` of the marker each."""
LAST_WORDS_S = 2.5
"""A rank that trips lives so long after its marker: once it is gone, the others' collectives fail before they look."""
LATE_S = 10.0
"""After its bound, when the thread itself cannot run, the timer of `faulthandler` takes over."""


class Watchdog:
    """Watches one rank. Thread-safe by being simple: the main thread only adds to a counter and sets a name."""

    def __init__(self, directory: StageDirectory, attempt: int, world: World, bounds: HangBounds) -> None:
        self._directory, self._attempt, self._world, self._bounds = directory, attempt, world, bounds
        self._section: Section = "start"
        self._beats = 0
        self._marker = directory.root / f"hung-attempt-{attempt}"

    @classmethod
    def start(cls, context: Context, bounds: HangBounds) -> "Watchdog":
        """Begin to watch this rank, in section `start`; the watch ends with the process."""
        watchdog = cls(context.directory, context.attempt, context.world, bounds)
        threading.Thread(target=watchdog._watch, name="watchdog", daemon=True).start()
        return watchdog

    def beat(self) -> None:
        """Progress was made."""
        self._beats += 1

    def enter(self, section: Section) -> None:
        """From now on the rank is in that section."""
        self._section = section
        self._beats += 1

    @contextmanager
    def section(self, section: Section) -> Iterator[None]:
        """A section inside another one."""
        before = self._section
        self.enter(section)
        try:
            yield
        finally:
            self.enter(before)

    def bound_s(self, section: Section) -> float:
        """Seconds without progress that a section may last."""
        return float(getattr(self._bounds, f"{section}_s"))

    def _watch(self) -> None:
        """Count the seconds since the last progress. A suspended process does not age: a long tick counts as two."""
        beats, idle_s, then = -1, 0.0, time.monotonic()
        while True:
            time.sleep(POLL_S)
            now = time.monotonic()
            tick_s, then = min(now - then, 2 * POLL_S), now
            section = self._section
            if self._beats == beats:
                idle_s += tick_s
            else:
                beats, idle_s = self._beats, 0.0
            if self._marker.exists():
                self._end(f"ended because another rank hung: {self._told()}")
            bound_s = self.bound_s(section)
            if idle_s >= bound_s:
                self._end(f"no progress in section {section!r} for {bound_s:g} s (train.health.hang.{section}_s)")
            faulthandler.dump_traceback_later(bound_s - idle_s + LATE_S, file=sys.__stderr__ or 2)

    def _end(self, why: str) -> None:
        """Marker, stacks, record, death."""
        world, root = self._world, self._directory.root
        message = f"rank {world.rank} on {world.node}: {why}; stacks: {root}/stacks-attempt-{self._attempt}-rank-*.txt"
        with suppress(Exception):  # a full disk must not keep it alive
            if not self._marker.exists():
                write_json(self._marker, {"rank": world.rank, "node": world.node, "why": why, "time": time.time()})
            print(f"watchdog: {message}", file=sys.__stderr__, flush=True)
            faulthandler.dump_traceback(file=sys.__stderr__ or 2)
            with Path(root, f"stacks-attempt-{self._attempt}-rank-{world.rank}.txt").open("w") as file:
                print(message, file=file, flush=True)
                faulthandler.dump_traceback(file=file)
        time.sleep(LAST_WORDS_S)
        with suppress(Exception):
            record_end(
                self._directory, self._attempt, world.rank, "failed", Hung.exit_code, message,
                is_crash=True, node=world.node,
            )  # fmt: skip
        os._exit(Hung.exit_code)

    def _told(self) -> str:
        """What the marker says."""
        try:
            found = json.loads(self._marker.read_text(encoding="utf-8"))
            return f"rank {found['rank']} on {found['node']}: {found['why']}"
        except (OSError, ValueError, KeyError):
            return f"see {self._marker}"
