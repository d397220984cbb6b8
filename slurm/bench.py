"""Benchmarks of the login plane: what a user waits for before anything runs."""

import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"
LIMITS_S = {"--help": 0.5, "plan configs/quickstart.yaml": 1.0, "fit mixtral-8x7b": 1.0}
"""Command -> CPU seconds that it may take on a node with one free core."""


def startup(repeats: int) -> str:
    """Measured CPU seconds (user and system) of each command in turns, medians, and the fraction of the limit."""
    seconds: dict[str, list[float]] = {command: [] for command in LIMITS_S}
    for _ in range(repeats):
        for command, measured in seconds.items():
            measured.append(_cpu_seconds(command.split()))
    lines = [f"{'command':<32} {'CPU s':>7} {'limit':>7} {'of limit':>9}   median of {repeats}, measured: getrusage"]
    for command, limit in LIMITS_S.items():
        value = median(seconds[command])
        lines.append(f"{command:<32} {value:>7.3f} {limit:>7.1f} {value / limit:>9.0%}")
    return "\n".join(lines)


def _cpu_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(LAUNCH), *arguments], check=True, capture_output=True, cwd=LAUNCH.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
