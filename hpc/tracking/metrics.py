"""metrics.jsonl: one row per logged step, appended by rank 0. The truth; W&B shows a copy (hpc/tracking/mirror.py).

A row: step (updates done), tokens, attempt, time (unix), then figures. After a resume the steps since the checkpoint
appear again with the next attempt's number: `history` keeps the last one of each step.
"""

from pathlib import Path
from typing import Any

from hpc.run.directory import read_jsonl


def history(path: Path) -> list[dict[str, Any]]:
    """Rows in the order of steps, the last attempt's row where a step was done more than once."""
    rows: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(path):
        if "step" in row:
            rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def value_at(path: Path, step: int, key: str) -> Any:
    """A figure of one step, whichever attempt measured it; None when there is none."""
    return next((row.get(key) for row in history(path) if row["step"] == step), None)


def replayed_steps(path: Path) -> int:
    """Steps that were computed more than once: an attempt died after its last checkpoint, or went back to it."""
    rows = [int(row["step"]) for row in read_jsonl(path) if "step" in row]
    return len(rows) - len(set(rows))
