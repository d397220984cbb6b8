"""A test's program on several ranks of this machine, each a process with one thread."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT


def on_ranks(ranks: int, module: str, out: Path, *words: object) -> dict[str, Any]:
    """What `python -m MODULE OUT WORDS` on all ranks leaves in OUT, a JSON file. A rank that fails fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(ranks), "CROSS_RANK": "0", "CROSS_SIZE": "1"}  # fmt: skip
    command = [sys.executable, "-m", module, str(out), *map(str, words)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    told = [process.communicate(timeout=900)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), told[0][-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found
