"""The process in which a library quantizes: started, listened to, ended with us; what it leaves is whole or nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from hpc.errors import ArtifactError
from hpc.runtimes.child import end_with_parent, environment
from hpc.shrink.request import Request

STEP = re.compile(rb"(\d+)/(\d+) \[")
"""How tqdm counts layers."""
KEPT_LINES = 200
"""Lines of the library's output of which the last is told when it fails."""


def quantize_apart(request: Request, progress: Callable[[float, float], None]) -> int:
    """Quantize in a process of its own; returns the most memory that it held resident, bytes.

    progress: told layers that are done, and of how many. Whatever an earlier attempt left is removed first. Raises
    ArtifactError with the last line that the library wrote when it fails.
    """
    scratch = Path(request.scratch)
    for left in (scratch, Path(request.target)):
        shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir(parents=True)
    asked = scratch / "request.json"
    asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "hpc.shrink.auto_round", str(asked)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(), preexec_fn=end_with_parent,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        lines = _listen(process.stderr.fileno(), progress)
        answer, code = process.stdout.read(), process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    if code != 0 or not Path(request.target).is_dir():
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        raise ArtifactError(f"auto-round {how} and left no model: {lines[-1] if lines else 'it said nothing'}")
    shutil.rmtree(scratch, ignore_errors=True)
    return int(answer.split()[-1])


def _listen(source: int, progress: Callable[[float, float], None]) -> list[str]:
    """Read until the other side closes; returns its last lines, bars left out."""
    lines: list[str] = []
    rest, told = b"", (-1, -1)
    while block := os.read(source, 65536):
        *whole, rest = re.split(rb"[\r\n]", rest + block)
        for line in whole:
            found = STEP.search(line)
            if found is None:
                lines = [*lines, line.decode(errors="replace").strip()][-KEPT_LINES:] if line.strip() else lines
            elif b"Quantizing" in line and (step := (int(found[1]), int(found[2]))) != told:
                told = step
                progress(*map(float, step))
    return [*lines, rest.decode(errors="replace").strip()] if rest.strip() else lines
