"""The process that an artifact is opened in: `python -m hpc.runtimes.serve`, called by hpc/runtimes/remote.py.

Requests come pickled on standard input and are answered on standard output, one after the other, until the input
ends. Whatever a library prints goes to standard error.
"""

import os
import pickle
import resource
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from hpc.errors import ConfigError, GreenMoEError
from hpc.runtimes.messages import MORE, Opening, Reply, send
from hpc.runtimes.runner import Runner


def open_here(opening: Opening) -> Runner:
    """Open an artifact in this process. Raises ArtifactError or ConfigError."""
    if opening.runtime == "llama.cpp":
        from hpc.runtimes.llama_cpp import LlamaCpp

        return LlamaCpp(opening.path, opening.context_length, opening.threads)
    if opening.runtime == "mlx":
        from hpc.runtimes.mlx_runner import Mlx

        return Mlx(opening.path)
    from hpc.runtimes.hugging_face import Transformers

    return Transformers(opening.path)


def answer(runner: Runner, name: str, arguments: tuple[Any, ...], requests: BinaryIO, replies: BinaryIO) -> None:
    """Call one method of the runner and send what it returns.

    A stream is sent token by token, each after the caller has asked for it, with the seconds that it took; between two
    tokens the caller may ask for something else, such as their text.
    """
    began = time.perf_counter()
    if name == "stream":
        for token in runner.stream(*arguments):
            send(replies, Reply(token, time.perf_counter() - began, is_last=False))
            while isinstance(word := pickle.load(requests), tuple):
                answer(runner, word[0], word[1], requests, replies)
            if word != MORE:
                break
            began = time.perf_counter()
        send(replies, Reply())
    elif name == "peak_memory_bytes":
        send(replies, Reply(peak_memory_bytes()))
    else:
        value = (
            runner.encode(arguments[0], special=arguments[1]) if name == "encode" else getattr(runner, name)(*arguments)
        )
        send(replies, Reply(value, time.perf_counter() - began))


def peak_memory_bytes() -> int:
    """Most memory that this process held resident, libraries included."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would tell of the process that started this one
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Serve until the input ends."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    began = time.perf_counter()
    try:
        runner = open_here(pickle.load(requests))
        send(replies, Reply(runner.vocab_size, time.perf_counter() - began))
        while True:
            name, arguments = pickle.load(requests)
            answer(runner, name, arguments, requests, replies)
    except EOFError:
        return
    except GreenMoEError as error:
        send(replies, Reply(error=error))
    except ImportError as error:
        send(replies, Reply(error=ConfigError(f"{error}: install the runtime that this artifact is for")))


if __name__ == "__main__":
    main()
