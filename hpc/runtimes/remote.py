"""An artifact opened by its own runtime in a fresh process: what a user's program would see, and nothing of ours.

A library that crashes, prints or patches others does so over there.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self, cast

import numpy as np
import numpy.typing as npt

from hpc.errors import ArtifactError
from hpc.runtimes.artifact import Runtime, locate
from hpc.runtimes.child import end_with_parent, environment
from hpc.runtimes.messages import MORE, Opening, Reply, send
from hpc.runtimes.runner import Sampling


@dataclass
class Clock:
    """Tokens and seconds of a kind of work, by the clock of the process that did it."""

    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count more of it."""
        self.tokens += tokens
        self.seconds += seconds

    @property
    def rate(self) -> float | None:
        """Tokens a second; None when there was nothing to measure."""
        return self.tokens / self.seconds if self.seconds > 0 and self.tokens else None


class Remote:
    """A `Runner` in a process of its own, with its clocks. Use it as a context manager. Raises what the
    runtime's door over there raises, and ArtifactError when the process dies."""

    def __init__(self, path: Path, context_length: int, threads: int | None = None) -> None:
        self.runtime: Runtime
        self.runtime, self.path = locate(path)
        self.reading, self.writing = Clock(), Clock()
        """Prompt tokens through `logits`; new tokens through `stream`, each after the first."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hpc.runtimes.serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
            env=environment(), preexec_fn=end_with_parent,
        )  # fmt: skip
        try:
            self._send(Opening(self.runtime, self.path.absolute(), context_length, threads or own_cores()))
            opened = self._receive()
        except BaseException:
            self.close()
            raise
        self.vocab_size = int(opened.value)
        self.load_seconds = opened.seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            stream.close()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """As in Runner."""
        return cast("list[int]", self._call("encode", text, special).value)

    def decode(self, ids: list[int]) -> str:
        """As in Runner."""
        return str(self._call("decode", ids).value)

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """As in Runner."""
        reply = self._call("logits", ids)
        self.reading.add(len(ids), reply.seconds)
        return cast("npt.NDArray[np.float32]", reply.value)

    def stream(self, ids: list[int], max_tokens: int, sampling: Sampling) -> Iterator[int]:
        """As in Runner."""
        self._send(("stream", (ids, max_tokens, sampling)))
        is_first, reply = True, self._receive()
        while not reply.is_last:
            if not is_first:  # the first token's time is that of the prompt
                self.writing.add(1, reply.seconds)
            is_first, answer = False, ""
            try:
                yield int(reply.value)
                answer = MORE
            finally:
                self._send(answer)
                reply = self._receive()

    def chat_prompt(self, messages: list[dict[str, str]]) -> str | None:
        """As in Runner."""
        return cast("str | None", self._call("chat_prompt", messages).value)

    def memory_bytes(self) -> int | None:
        """As in Runner."""
        return cast("int | None", self._call("memory_bytes").value)

    def peak_memory_bytes(self) -> int:
        """Most memory that the process held resident so far, libraries included."""
        return int(self._call("peak_memory_bytes").value)

    def _call(self, name: str, *arguments: object) -> Reply:
        self._send((name, arguments))
        return self._receive()

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        try:
            send(cast("Any", self._process.stdin), message)
        except BrokenPipeError:
            self._died()

    def _receive(self) -> Reply:
        assert self._process.stdout is not None
        try:
            reply: Reply = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            self._died()
        if reply.error is not None:
            raise reply.error
        return reply

    def _died(self) -> NoReturn:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        last = f": {lines[-1].strip()}" if lines else ""
        raise ArtifactError(f"{self.runtime} {how} while it read {self.path}{last}")


def own_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
