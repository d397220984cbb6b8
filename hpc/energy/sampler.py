"""One process per node that reads its counters once a second and appends to energy-HOST.jsonl.

    {"event": "start",  "attempt", "host", "time", "counters": [{name, scope, provenance}], "notes", "unmeasured",
                        "upper_bound", "pid", "interval_s"}
    {"event": "sample", "attempt", "time", "energy_j": {counter: J}, "power_w": {counter: W},
                        "total_energy_j", "total_power_w"}
    {"event": "note",   "attempt", "time", "text"}         a wrap that may be missing, a restart, a failing counter, ...
    {"event": "end",    ... the same as a sample ...}

A sample has these too where there is something to say:
    "unsure_j"  at most so many joules more were drawn: the true energy is total_energy_j to total_energy_j + unsure_j
    "stale_s"   {counter: seconds since it last answered}; its energy stands where it was then
    "gap_s"     seconds since the row before, when longer than it should be (a full disk, a suspended process)
    "share"     this stage's part of the interval (1/n), when n stages of one user run on the node at once
    "detail_j"  joules of parts inside a counter's scope, once a minute and at the end; never to be added

Energy is cumulative since the start of the attempt. It is that of the node, whoever else uses it: where the job holds
only a part of the node, `upper_bound` says so.

The sampler lives in a session of its own and survives a killed trainer. It ends at once when the watched process is
gone, or on SIGINT, by which its stage asks for the last sample. SIGTERM does not end it: Slurm sends that to all
processes of a job, and the trainer that saves a checkpoint then draws power still.
"""

import argparse
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hpc.energy.counters import Counter, Discovery, discover
from hpc.energy.samples import Neighbours, SampleFile, Shares

START_TIMEOUT_S = 5.0
END_PATIENCE_S = 3.0
"""How long the last row is tried on a full disk."""
DETAIL_EVERY = 60
"""Samples between two rows with details."""
MOST_NOTES = 200
"""Notes kept for a disk that is full; more say nothing new."""


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
    folder: Path, node: str, watch_pid: int, attempt: int, power_model_json: str, root: Path = Path("/")
) -> "subprocess.Popen[bytes]":
    """Start the sampler of this node for one attempt; it ends by itself when `watch_pid` is gone.

    Returns once it samples, so that the work it measures does not run ahead of it.
    """
    command = [
        sys.executable, "-m", "hpc.energy.sampler", "--out", str(folder), "--watch-pid", str(watch_pid),
        "--attempt", str(attempt), "--node", node, "--power-model", power_model_json, "--root", str(root),
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
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Watch:
    """Sleeps between samples, and wakes when the watched process is gone or a signal asks for the end."""

    def __init__(self, pid: int) -> None:
        self.is_over = False
        self._pidfd: int | None = None
        self._process: psutil.Process | None = None
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self.is_over = True
        except (AttributeError, OSError):  # before Linux 5.3, or not Linux: look once a second instead
            self._process = _process(pid)
            self.is_over = self._process is None
        self._woken, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGINT, self._end)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def sleep(self, seconds: float) -> None:
        """Until `seconds` are over or it is."""
        handles = [self._woken] if self._pidfd is None else [self._woken, self._pidfd]
        ready, _, _ = select.select(handles, [], [], max(0.0, seconds))
        if self._pidfd in ready or (self._process is not None and not _is_alive(self._process)):
            self.is_over = True

    def _end(self, *_: object) -> None:
        self.is_over = True


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


class Sampler:
    """Reads all counters and makes rows of them."""

    def __init__(self, counters: list[Counter], attempt: int, neighbours: Neighbours, interval_s: float) -> None:
        self._counters, self._attempt, self._interval_s = counters, attempt, interval_s
        self._neighbours, self._shares = neighbours, Shares()
        self._num_samples, self._users = 0, 1
        self._written: float | None = None
        self.notes: list[dict[str, Any]] = []
        """Note rows that are still to be written."""

    def sample(self, event: str = "sample") -> dict[str, Any]:
        """One row: every counter read once. Totals are None when any counter has nothing to say."""
        share = self._share()
        readings = {counter.name: counter.read() for counter in self._counters}
        self._num_samples += 1
        energy = {n: _round(self._shares.take(n, r.energy_j, share)) for n, r in readings.items()}
        power = {n: None if r.power_w is None else _round(r.power_w * share) for n, r in readings.items()}
        row: dict[str, Any] = {
            "event": event, "attempt": self._attempt, "time": round(time.time(), 3), "energy_j": energy,
            "power_w": power, "total_energy_j": _total(energy), "total_power_w": _total(power),
            "unsure_j": _round(sum(reading.unsure_j for reading in readings.values())),
            "stale_s": {n: round(r.stale_s, 1) for n, r in readings.items() if r.stale_s},
            "gap_s": self._gap(), "share": share if share < 1 else None,
        }  # fmt: skip
        details = {f"{n} {part}": j for n, r in readings.items() for part, j in r.detail_j.items()}
        ours = {name: _round(self._shares.take(name, joules, share)) for name, joules in details.items()}
        if event == "end" or self._num_samples % DETAIL_EVERY == 0:
            row["detail_j"] = ours
        for reading in readings.values():
            for text in reading.notes:
                self.note(text)
        return {k: v for k, v in row.items() if v or k not in ("unsure_j", "stale_s", "gap_s", "share", "detail_j")}

    def note(self, text: str) -> None:
        """Tell something in a row of its own."""
        if len(self.notes) < MOST_NOTES:
            self.notes.append({"event": "note", "attempt": self._attempt, "time": round(time.time(), 3), "text": text})

    def wrote(self) -> None:
        """The last sample is on disk."""
        self._written = time.monotonic()

    def _gap(self) -> float | None:
        seconds = 0.0 if self._written is None else time.monotonic() - self._written
        return round(seconds, 1) if seconds > 2.5 * self._interval_s else None

    def _share(self) -> float:
        users = self._neighbours.count()
        if users != self._users:
            self.note(f"{users} stages of this user on the node: each counts 1/{users} of it from here (derived)")
        self._users = users
        return 1 / users


def _round(value: float | None) -> float | None:
    """To a millijoule or a milliwatt: no counter tells more, and a row a second for weeks should be short."""
    return None if value is None else round(value, 3)


def _total(values: dict[str, float | None]) -> float | None:
    known = [value for value in values.values() if value is not None]
    return _round(sum(known)) if values and len(known) == len(values) else None


def shared_with(environment: Mapping[str, str], num_cpus: int, num_gpus: int) -> str | None:
    """Why others may use this node as well, so that its energy is an upper bound for this job; None if nothing says so.

    Asked of the job ("64(x2),32"), not of the step or the process, which may be bound to less than the job holds.
    Sites reserve cores for the system and count cores or threads: only less than half a node is taken for a share.
    """
    counts = [int(text) for text in re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_JOB_CPUS_PER_NODE", ""))]
    if counts and 2 * max(counts) < num_cpus:
        return f"upper bound: the job has {max(counts)} of {num_cpus} CPUs, the whole node is counted"
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdigit() and 0 < int(gpus) < num_gpus:
        return f"upper bound: the job has {gpus} of {num_gpus} GPUs, the whole node is counted"
    return None


def _start_row(found: Discovery, host: str, attempt: int, interval_s: float) -> dict[str, Any]:
    num_gpus = sum(part.kind == "gpu" and bool(part.index) for c in found.counters for part in c.parts)
    shared = shared_with(os.environ, psutil.cpu_count() or 1, num_gpus)
    counters = [{"name": c.name, "scope": c.scope, "provenance": c.provenance} for c in found.counters]
    return {
        "event": "start", "attempt": attempt, "host": host, "time": round(time.time(), 3), "counters": counters,
        "notes": [*found.notes, *([shared] if shared else [])], "unmeasured": found.unmeasured, "upper_bound": shared,
        "pid": os.getpid(), "interval_s": interval_s,
    }  # fmt: skip


def _run(file: SampleFile, sampler: Sampler, start: dict[str, Any], watch: Watch, interval_s: float) -> None:
    """Start row, samples, end row, each as soon as the disk takes it."""
    is_started = False

    def write(row: dict[str, Any]) -> bool:
        nonlocal is_started
        is_started = is_started or file.append(start)
        while is_started and sampler.notes and file.append(sampler.notes[0]):
            sampler.notes.pop(0)
        is_written = is_started and file.append(row)
        if is_written:
            sampler.wrote()
        return is_written

    due = time.monotonic()
    while not watch.is_over:
        write(sampler.sample())
        due = max(due + interval_s, time.monotonic())
        while not watch.is_over and time.monotonic() < due:
            watch.sleep(due - time.monotonic())
    last = sampler.sample("end")
    deadline = time.monotonic() + END_PATIENCE_S
    while not write(last) and time.monotonic() < deadline:
        time.sleep(0.1)


def main() -> None:
    """Sample until the watched process is gone or SIGINT asks for the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of energy-HOST.jsonl")
    parser.add_argument("--watch-pid", type=int, required=True, help="end when this process is gone")
    parser.add_argument("--attempt", type=int, default=1)
    parser.add_argument("--node", default=socket.gethostname(), help="name of this node")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between samples, at most 10")
    parser.add_argument("--power-model", default="", help="JSON of the site's power model")
    parser.add_argument("--root", type=Path, default=Path("/"), help="root of the sysfs tree")
    options = parser.parse_args()

    watch = Watch(options.watch_pid)
    file = SampleFile(options.out / f"energy-{options.node}.jsonl")
    claimed = file.claim(options.attempt)
    if claimed is None:
        print(f"attempt {options.attempt} on {options.node} is sampled already")
        return
    found = discover(Coefficients.from_json(options.power_model) if options.power_model else None, options.root)
    start = _start_row(found, options.node, options.attempt, options.interval)
    neighbours = Neighbours(options.node, options.root)
    sampler = Sampler(found.counters, options.attempt, neighbours, options.interval)
    if claimed:
        sampler.note(claimed)
    try:
        _run(file, sampler, start, watch, options.interval)
    finally:
        neighbours.leave()


if __name__ == "__main__":
    main()
