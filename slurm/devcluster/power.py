"""A power meter for every node of a dev cluster: one small process that writes HPE Cray's pm_counters.

    ROOT/power/NODE/{energy,power,freshness,...}   seen inside the node as /sys/cray/pm_counters, 10 times a second
    ROOT/power/fed.jsonl                           {"time", "joules": {node: J}} once a second: what was fed, exactly

A node draws a constant power, on or off: the meter of a Cray node belongs to its cabinet and goes on too. A file is
written over in place, in one call and always to the same length: a reader never meets an empty one (it would take it
for 0 J, and Slurm would report 2^64 J), and no disk is waited for, as a rename ten times a second would.

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
LENGTH = 63
"""Of a file, without its end of line."""


def folder(root: Path, node: str) -> Path:
    """Where a node's meter is."""
    return root / "power" / node


class Meter:
    """The files of one node."""

    def __init__(self, root: Path, node: str, watts: float) -> None:
        place = folder(root, node)
        place.mkdir(parents=True, exist_ok=True)
        self.watts = watts
        names = ("energy", "power", "freshness", "startup", "generation", "raw_scan_hz", "version", "power_cap")
        self._files = {name: os.open(place / name, os.O_WRONLY | os.O_CREAT, 0o644) for name in names}

    def write(self, **words: object) -> None:
        """Show what these files say now, in this order."""
        for name, text in words.items():
            os.pwrite(self._files[name], f"{text}".ljust(LENGTH).encode() + b"\n", 0)

    def show(self, seconds: float, number: int) -> float:
        """Show what was fed in so many seconds; returns it, J."""
        joules, stamp = self.watts * seconds, f"{round(time.time() * 1e6)} us"
        self.write(
            energy=f"{BASE_J + round(joules)} J {stamp}", power=f"{round(self.watts)} W {stamp}", freshness=number
        )
        return joules


def feed(root: Path, watts: dict[str, float]) -> None:
    """Feed all meters until the process is killed."""
    with suppress(PermissionError):
        os.nice(-10)  # a meter is not late because its node computes
    began, number = time.time(), 0
    meters = {node: Meter(root, node, power) for node, power in watts.items()}
    for meter in meters.values():
        meter.write(startup=round(began * 1e6), generation=1, raw_scan_hz=HZ, version=2, power_cap="0 W 0 us")
    with (root / "power" / "fed.jsonl").open("a", encoding="utf-8", buffering=1) as log:
        due = time.monotonic()
        while True:
            now = time.time()
            fed = {node: meter.show(now - began, number) for node, meter in meters.items()}
            if number % HZ == 0:
                log.write(json.dumps({"time": now, "joules": fed}) + "\n")
            number += 1
            due = max(due + 1 / HZ, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))


def main() -> None:
    """The command that a cluster starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("nodes", nargs="+", metavar="NODE=WATTS")
    options = parser.parse_args()
    feed(options.root, {name: float(watts) for name, _, watts in (word.partition("=") for word in options.nodes)})


if __name__ == "__main__":
    main()
