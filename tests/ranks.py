"""A test's program on several ranks of this machine, each a process with one thread.

Ranks are forked from one server that has loaded the libraries (torch, DeepSpeed, transformers) once for the session:
loading them takes each rank longer than most of these programs. Nothing of ours is loaded there.
"""

import json
import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

LIBRARIES = ("torch", "torch.distributed", "transformers.modeling_utils", "deepspeed", "peft")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(list(LIBRARIES))


def start_ranks(ranks: int, module: str, words: list[str], logs: Path) -> list[ForkServerProcess]:
    """Start `python -m MODULE WORDS` on each rank of a new process group; what rank N prints is in LOGS/log-N.txt."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(ranks), "CROSS_RANK": "0", "CROSS_SIZE": "1"}  # fmt: skip
    processes = []
    for rank in range(ranks):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (module, words, environment, str(logs / f"log-{rank}.txt"))
        processes.append(SERVER.Process(target=_be_rank, args=arguments))
        processes[-1].start()
    return processes


def _be_rank(module: str, words: list[str], environment: dict[str, str], log: str) -> None:
    """The rest of the life of a forked process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def end_of(processes: list[ForkServerProcess], timeout_s: float) -> list[int | None]:
    """Exit codes of ranks; what is still there after `timeout_s` is killed."""
    for process in processes:
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def on_ranks(ranks: int, module: str, out: Path, *words: object) -> dict[str, Any]:
    """What `python -m MODULE OUT WORDS` on all ranks leaves in OUT, a JSON file. A rank that fails fails the test."""
    out.unlink(missing_ok=True)
    processes = start_ranks(ranks, module, [str(out), *map(str, words)], out.parent)
    codes = end_of(processes, 900)
    assert codes == [0] * ranks, (out.parent / "log-0.txt").read_text()[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found
