"""What rank 0 of an attempt was doing, and since when: timeline.jsonl, one line where the phase changes.

    {"attempt", "time", "phase", "step"}

start       processes, imports, inputs, the model, a checkpoint that is loaded; an attempt begins with it
compile     the engine is built and rehearses: kernels are built and memory is asked for
productive  steps, the held-out loss between and after them, the artifact; all of a stage that does not train
checkpoint  training stands still for a checkpoint; `step` is its step
idle        the receipt is written; what is left is for others to see

A phase lasts until the next line, or until the attempt ends. There is no line for a step: metrics.jsonl has those.
"""

import time
from dataclasses import dataclass
from typing import Literal

from hpc.run.directory import StageDirectory, append_jsonl, read_jsonl

Phase = Literal["start", "compile", "productive", "checkpoint", "idle"]


@dataclass(frozen=True)
class Change:
    """A phase that began."""

    attempt: int
    time: float
    phase: str
    step: int | None = None


def enter(directory: StageDirectory, attempt: int, phase: Phase, step: int | None = None) -> None:
    """Note that a phase begins (rank 0)."""
    append_jsonl(directory.timeline, {"attempt": attempt, "time": time.time(), "phase": phase, "step": step})


def read_timeline(directory: StageDirectory) -> list[Change]:
    """All changes, as they were written; none for a stage that kept no timeline."""
    return [
        Change(int(row["attempt"]), float(row["time"]), str(row["phase"]), row.get("step"))
        for row in read_jsonl(directory.timeline)
    ]
