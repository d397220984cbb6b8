"""Two training programs in turns: each in processes of its own, one at work while the other waits.

A machine's speed drifts within minutes, by heat and by neighbours. Programs that run one after the other measure the
drift as well; programs that alternate step by step share it, and the ratio of a round is theirs alone.

The processes are forked from one server that has imported the libraries, so that all start equal and at once; what a
side's memory grew by is counted from there.
"""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from hpc.errors import GreenMoEError

PATIENCE_S = 120.0
"""Longest wait for one turn or one start."""

Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""What a turn is timed by: on a machine that others use, CPU seconds of one-thread programs vary ten times less."""


@dataclass(frozen=True)
class Turn:
    """Some optimizer steps of one side."""

    seconds: float
    loss: float
    """Of the last step on rank 0."""
    memory_gib: float
    """Peak resident memory so far above what the libraries took, of all its ranks together."""


class Failed(Exception):
    """A side that cannot run here; the message is its row in the table."""


class Over(BaseException):
    """Ends a side from inside whatever loop it runs in."""


class Turns:
    """The side's end: works when told to, and says how long it took."""

    def __init__(self, pipe: Connection, clock: Clock) -> None:
        self._pipe, self._clock, self._floor = pipe, CLOCKS[clock], memory_gib("VmRSS")
        self._left, self._began = 0, 0.0

    def start(self) -> None:
        """Call when ready to train: returns when it is this side's first turn."""
        self._pipe.send("ready")
        self._wait()

    def step(self, loss: float) -> None:
        """Call after every optimizer step: returns when the next one is due. Raises Over when there is none."""
        self._left -= 1
        if self._left == 0:
            seconds = self._clock() - self._began
            self._pipe.send(Turn(seconds, loss, memory_gib("VmHWM") - self._floor))
            self._wait()

    def _wait(self) -> None:
        self._left = self._pipe.recv()
        if not self._left:
            raise Over
        self._began = self._clock()


def memory_gib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, GiB, measured by the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


Program = Callable[[Turns, Any], None]
"""A side: (turns, case) -> never returns by itself. Top-level functions, so that they can be pickled."""


class Side:
    """The bench's end of one program on `ranks` processes."""

    def __init__(self, program: Program, case: Any, ranks: int, clock: Clock = "wall") -> None:
        context = multiprocessing.get_context("forkserver")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            values = {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks),
                "CROSS_RANK": "0", "CROSS_SIZE": "1",
            }  # fmt: skip
            process = context.Process(target=_run, args=(program, theirs, case, values, clock), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            self._hear()
        except Failed:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return [process.pid for process in self._processes if process.pid is not None]

    def turn(self, steps: int) -> Turn:
        """Let it do some steps. Raises Failed."""
        for pipe in self._pipes:
            pipe.send(steps)
        turns = self._hear()
        return Turn(max(turn.seconds for turn in turns), turns[0].loss, sum(turn.memory_gib for turn in turns))

    def _hear(self) -> list[Any]:
        words = []
        for pipe in self._pipes:
            try:
                word = pipe.recv() if pipe.poll(PATIENCE_S) else Failed(f"no answer in {PATIENCE_S:.0f} s")
            except EOFError:
                word = Failed("its process died")
            if isinstance(word, Failed):
                raise word
            words.append(word)
        return words

    def close(self) -> None:
        """End its processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _run(program: Program, pipe: Connection, case: Any, values: Mapping[str, str], clock: Clock) -> None:
    os.environ.update(values)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    turns = Turns(pipe, clock)
    try:
        program(turns, case)
    except Over:
        pass
    except (ImportError, GreenMoEError) as error:
        pipe.send(Failed(f"absent: {str(error).splitlines()[0]}"))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:200]
        pipe.send(Failed(f"failed: {type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"))
    os._exit(0)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own, forked from the server."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    return answer


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))


def serve(preload: list[str], environment: Mapping[str, str]) -> None:
    """Start the server that all sides are forked from, with an environment that the allocator reads at its start."""
    before = dict(os.environ)
    os.environ.update(environment)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    from multiprocessing.forkserver import ensure_running

    ensure_running()
    os.environ.clear()
    os.environ.update(before)
