"""How modules of ours are started as programs: where Python finds them, and that none outlives its parent."""

import ctypes
import os
import signal
import sys
from pathlib import Path


def environment() -> dict[str, str]:
    """This process's environment, in which `python -m hpc...` is found whatever the working directory is."""
    places = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


if sys.platform == "linux":
    LIBC = ctypes.CDLL(None)

    def end_with_parent() -> None:
        """For preexec_fn: the kernel ends the process with the thread that started it, however that ends (prctl(2))."""
        LIBC.prctl(1, signal.SIGKILL)
else:
    end_with_parent = None
