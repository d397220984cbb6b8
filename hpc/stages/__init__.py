"""One readable file per stage kind: read the earlier receipts, do the work, return what the receipt says."""

from collections.abc import Callable
from importlib import import_module

from hpc.run.task import Context, Result


def stage_function(kind: str) -> Callable[[Context], Result]:
    """`hpc.stages.KIND.run`, imported only where it runs."""
    run: Callable[[Context], Result] = import_module(f"hpc.stages.{kind}").run
    return run
