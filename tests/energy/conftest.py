"""An interpreter for packages that must not be installed beside ours, and readers of counters in their own process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

OURS = """
import json, sys
from pathlib import Path
from hpc.energy.counters import discover
found = discover(None, Path(sys.argv[1]))
def tell(what): print(json.dumps(what), flush=True)
tell({"counters": [[c.name, c.scope] for c in found.counters], "notes": found.notes, "unmeasured": found.unmeasured})
for _ in sys.stdin:
    readings = {c.name: c.read() for c in found.counters}
    tell({n: {"energy_j": r.energy_j, "notes": r.notes, "power_w": r.power_w} for n, r in readings.items()})
"""


class Reader:
    """A process that reads a node's counters when asked."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.found: dict[str, Any] = self._hear()

    def read(self) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = self._hear()
        return answer

    def _hear(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the reader died"
        return json.loads(line)


@contextmanager
def reader(
    root: Path, environment: Mapping[str, str], python: str = sys.executable, code: str = OURS
) -> Iterator[Reader]:
    """Read the counters of a fake node with other libraries, another interpreter, or a peer's code."""
    values = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    command = [python, "-c", code, str(root)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=values, start_new_session=True
    )
    try:
        yield Reader(process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # zeus has a process for each RAPL zone
        process.communicate()


@pytest.fixture
def python_with() -> Callable[[str], str]:
    """An interpreter that has a package, or a skip that says how to run the test.

    zeus and codecarbon install beside our pins (`pip install .[peers]`), but bring scikit-learn and an amdsmi of one
    ROCm release. An environment of their own does as well: `python -m venv DIR; DIR/bin/pip install zeus==0.16.0
    codecarbon==3.3.2`, named by GREENMOE_POWER_PYTHON=DIR/bin/python.
    """

    def find(package: str) -> str:
        for python in (os.environ.get("GREENMOE_POWER_PYTHON"), sys.executable):
            code = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({package!r}))"
            if python and subprocess.run([python, "-c", code]).returncode == 0:
                return python
        pytest.skip(
            f"needs {package}: pip install .[peers], or GREENMOE_POWER_PYTHON=DIR/bin/python of a venv that has it"
        )

    return find
