"""Models that are trained for a claim: a chain run as a user runs it, and what its stages left."""

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpc
from hpc.bench.claims.claim import Bench, Measured
from hpc.bench.claims.curves import Point, held_out_curve
from hpc.errors import StageError, error_by_exit_code
from hpc.run.directory import RunDirectory
from hpc.run.receipt import read_receipt

CONFIGS = Path(hpc.__file__).parent.parent / "configs"


@dataclass(frozen=True)
class Trained:
    """What a training stage left, as a comparison sees it."""

    curve: list[Point]
    metrics: dict[str, Any]
    """The receipt's."""
    energy_how: str
    """Where its joules come from."""

    @property
    def loss(self) -> float:
        """Over all held-out tokens, after the last step."""
        return float(self.metrics["heldout_loss"])


@dataclass
class Load:
    """How busy the machine was while models were trained: the largest mean over five minutes, by the kernel."""

    largest: float = 0.0

    def look(self) -> None:
        """Remember the load now, if it is larger."""
        self.largest = max(self.largest, os.getloadavg()[1])

    @property
    def is_shared(self) -> bool:
        """Whether others worked here too: two ranks of a core each, and no more, are a load of the number of cores."""
        return self.largest > (os.cpu_count() or 1) + 1

    @property
    def told(self) -> Measured:
        """The figure, for the page."""
        provenance = f"measured: kernel; cores: {os.cpu_count()}"
        return Measured("load of the machine, largest of five minutes", self.largest, "", provenance)


def launch(bench: Bench, claim: str, file: str, name: str, settings: Iterable[str]) -> RunDirectory:
    """`launch.py run configs/FILE --set ...` below the bench's folder; returns the directory of the run, called `name`.

    The directory is the same every time: what the settings do not change is not made again. Raises the error that the
    run ended with.
    """
    words = [word for setting in (f"run_root={bench.folder}", *settings) for word in ("--set", setting)]
    command = [sys.executable, str(CONFIGS.parent / "launch.py"), "run", str(CONFIGS / file), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise error_by_exit_code(done.returncode, f"{claim}: {last.removeprefix('error: ')}")
    return RunDirectory(bench.folder / name)


def trained(run: RunDirectory, stage: str) -> Trained:
    """What a finished training stage left. Raises StageError without a receipt."""
    directory = run.stage(stage)
    receipt = read_receipt(directory)
    if receipt is None:
        raise StageError(f"stage {stage!r} left no receipt in {directory.root}")
    how = "; ".join(str(source) for source in receipt.energy.get("provenance", [])) or "no counter"
    return Trained(held_out_curve(directory.metrics), receipt.metrics, how)
