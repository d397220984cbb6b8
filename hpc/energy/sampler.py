"""One process per node that reads its counters once a second and appends to energy-HOST.jsonl.

    {"event": "start",  "attempt", "host", "time", "counters": [{name, scope, provenance}], "notes"}
    {"event": "sample", "attempt", "time", "energy_j": {counter: J}, "power_w": {counter: W},
                        "total_energy_j", "total_power_w", "cpu_util"}
    {"event": "end",    ... the same ...}

Energy is cumulative since the start of the attempt. The sampler lives in a session of its own: it survives a killed
trainer, notices within a second that the watched process is gone, writes its last sample and ends.
"""

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hpc.energy.counters import Counter, discover
from hpc.run.directory import ends_torn

START_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Coefficients:
    """A power model as plain numbers, so that the sampler needs no configuration library."""

    cpu_idle_w_per_core: float
    cpu_busy_w_per_core: float
    dram_w_per_gib: float
    source: str

    @classmethod
    def from_json(cls, text: str) -> "Coefficients":
        """From the JSON of hpc.config.PowerModel."""
        values = json.loads(text)
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


def start_sampler(
    folder: Path, node: str, watch_pid: int, attempt: int, power_model_json: str
) -> "subprocess.Popen[bytes]":
    """Start the sampler of this node for one attempt; it ends by itself when `watch_pid` is gone.

    Returns once it samples, so that the work it measures does not run ahead of it.
    """
    command = [
        sys.executable, "-m", "hpc.energy.sampler", "--out", str(folder), "--watch-pid", str(watch_pid),
        "--attempt", str(attempt), "--node", node, "--power-model", power_model_json,
    ]  # fmt: skip
    samples = folder / f"energy-{node}.jsonl"
    before = samples.stat().st_size if samples.exists() else 0
    with samples.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if samples.exists() and samples.stat().st_size > before:
            break
        time.sleep(0.01)
    return process


def stop_sampler(process: "subprocess.Popen[bytes]", timeout_s: float = 5.0) -> None:
    """Ask for the last sample and wait for it."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def sample(counters: list[Counter], attempt: int, event: str = "sample") -> dict[str, Any]:
    """One row: every counter read once. Totals are None when any counter has nothing to say."""
    readings = {counter.name: counter.read() for counter in counters}
    energy = {name: reading.energy_j for name, reading in readings.items()}
    power = {name: reading.power_w for name, reading in readings.items()}
    return {
        "event": event,
        "attempt": attempt,
        "time": time.time(),
        "energy_j": energy,
        "power_w": power,
        "total_energy_j": _total(energy),
        "total_power_w": _total(power),
    }


def _total(values: dict[str, float | None]) -> float | None:
    known = [value for value in values.values() if value is not None]
    return sum(known) if values and len(known) == len(values) else None


def main() -> None:
    """Sample until the watched process is gone or a signal asks for the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of energy-HOST.jsonl")
    parser.add_argument("--watch-pid", type=int, required=True, help="end when this process is gone")
    parser.add_argument("--attempt", type=int, default=1)
    parser.add_argument("--node", default=socket.gethostname(), help="name of this node")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between samples")
    parser.add_argument("--power-model", default="", help="JSON of the site's power model")
    parser.add_argument("--root", type=Path, default=Path("/"), help="root of the sysfs tree")
    options = parser.parse_args()

    ended: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, _: ended.append(signum))
    watched = _process(options.watch_pid)
    found = discover(Coefficients.from_json(options.power_model) if options.power_model else None, options.root)
    host = options.node
    path = options.out / f"energy-{host}.jsonl"
    with path.open("a", encoding="utf-8", buffering=1) as file:
        if ends_torn(path):
            file.write("\n")

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")

        counters = [{"name": c.name, "scope": c.scope, "provenance": c.provenance} for c in found.counters]
        write(
            {"event": "start", "attempt": options.attempt, "host": host, "time": time.time(), "counters": counters,
             "notes": found.notes}
        )  # fmt: skip
        due = time.monotonic()
        while not ended and watched is not None and _is_alive(watched):
            write(sample(found.counters, options.attempt))
            due = max(due + options.interval, time.monotonic())
            while not ended and time.monotonic() < due:
                time.sleep(min(0.5, max(0.0, due - time.monotonic())))
        write(sample(found.counters, options.attempt, "end"))


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _is_alive(process: psutil.Process) -> bool:
    """Running, the same process (not a reused number), and not a zombie that nobody has collected."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main()
