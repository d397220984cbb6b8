"""A power meter for every node of a dev cluster: one small process that writes HPE Cray's pm_counters.

    ROOT/power/NODE/{energy,power,freshness,...}   seen inside the node as /sys/cray/pm_counters, 10 times a second
    ROOT/power/fed.jsonl                           {"time", "joules": {node: J}} once a second: what was fed, exactly

A node draws a constant power, on or off: the meter of a Cray node belongs to its cabinet and goes on too. Each file is
replaced by rename: a reader that meets an empty one takes it for 0 J, and Slurm then reports 2^64 J.

    python -m slurm.devcluster.power ROOT n1=100 n2=200
"""

import argparse
import json
import os
import time
from contextlib import suppress
from pathlib import Path

HZ = 10
BASE_J = 5_000_000
"""What the meter shows at first, as one that has run for a while."""


def folder(root: Path, node: str) -> Path:
    """Where a node's meter is."""
    return root / "power" / node


def write_meters(root: Path, watts: dict[str, float], began: float, number: int) -> dict[str, float]:
    """Update all meters to now; returns the joules fed to each node since `began` (unix seconds)."""
    now = time.time()
    fed = {node: power * (now - began) for node, power in watts.items()}
    stamp = f"{round(now * 1e6)} us"
    for node, joules in fed.items():
        place = folder(root, node)
        _replace(place / "energy", f"{BASE_J + round(joules)} J {stamp}")
        _replace(place / "power", f"{round(watts[node])} W {stamp}")
        _replace(place / "freshness", str(number))
    return fed


def feed(root: Path, watts: dict[str, float]) -> None:
    """Feed all meters until the process is killed."""
    with suppress(PermissionError):
        os.nice(-10)  # a meter is not late because its node computes
    began, number = time.time(), 0
    for node in watts:
        place = folder(root, node)
        place.mkdir(parents=True, exist_ok=True)
        for name, text in (("startup", f"{round(began * 1e6)}"), ("generation", "1"), ("raw_scan_hz", str(HZ)),
                           ("version", "2"), ("power_cap", "0 W 0 us")):  # fmt: skip
            _replace(place / name, text)
    with (root / "power" / "fed.jsonl").open("a", encoding="utf-8", buffering=1) as log:
        due = time.monotonic()
        while True:
            fed = write_meters(root, watts, began, number)
            if number % HZ == 0:
                log.write(json.dumps({"time": time.time(), "joules": fed}) + "\n")
            number += 1
            due = max(due + 1 / HZ, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))


def _replace(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}")
    staging.write_text(text + "\n")
    staging.replace(path)


def main() -> None:
    """The command that a cluster starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("nodes", nargs="+", metavar="NODE=WATTS")
    options = parser.parse_args()
    feed(options.root, {name: float(watts) for name, _, watts in (word.partition("=") for word in options.nodes)})


if __name__ == "__main__":
    main()
