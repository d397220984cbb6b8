"""What the energy sampler itself costs, on fake nodes: CPU seconds a sample against 0.1 % of a core at 1 Hz.

Two real sampler processes run side by side, started as a stage starts them, one on a Cray node with four accelerators
(pm_counters) and one on a node with two packages, their memory and four NVIDIA GPUs behind a C library. CPU time is the
kernel's, from the first row to the last; starting up is told apart. Not in it: what a real driver does inside a call
(a read of NVML's counter is an ioctl), so on a node with GPUs look at the sampler with `top` once.
"""

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from hpc.bench.fake_node import FakeGpu, FakeNvml, cray, rapl
from hpc.config import PowerModel
from hpc.energy.sampler import start_sampler, stop_sampler

LIMIT = 1e-3
"""Part of one core that the sampler may take: CPU seconds a sample at one sample a second."""

MODEL = PowerModel(cpu_idle_w_per_core=1, cpu_busy_w_per_core=4, dram_w_per_gib=0.4, source="made up for a bench")


def measure(seconds: float) -> dict[str, Any]:
    """One row a node, and the larger of their parts of the limit."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        nodes = {"cray": folder / "cray", "gpus": folder / "gpus"}
        for root in nodes.values():
            root.mkdir()
        inside = {"cpu": 10, "memory": 10, **{f"accel{number}": 10 for number in range(4)}}
        cray(nodes["cray"], 1000, inside=inside, startup=1, generation=1)
        environment = _gpu_node(nodes["gpus"])
        before = dict(os.environ)
        os.environ.update(environment)
        samplers = {
            name: start_sampler(folder, name, os.getpid(), 1, MODEL.model_dump_json(), root)
            for name, root in nodes.items()
        }
        os.environ.clear()
        os.environ.update(before)
        started = {name: cpu_seconds(process.pid) for name, process in samplers.items()}
        time.sleep(seconds)
        rows = [_row(name, process, folder, started[name]) for name, process in samplers.items()]
        for process in samplers.values():
            stop_sampler(process)
    return {
        "limit_cpu_s_per_sample": LIMIT,
        "nodes": rows,
        "fraction_of_limit": max(row["cpu_s_per_sample"] for row in rows) / LIMIT,
        "peak_rss_mib": max(row["peak_rss_mib"] for row in rows),
        "method": "measured: kernel's CPU time of the real process on fake counters; a driver's own time is not in it",
    }


def _gpu_node(root: Path) -> dict[str, str]:
    """Two packages with memory and four GPUs; without a C compiler only the former. The environment to read it in."""
    for socket in range(2):
        rapl(root, f"{socket}", f"package-{socket}", 10**9 * (socket + 1))
        rapl(root, f"{socket}:0", "dram", 10**8 * (socket + 1))
    try:
        nvml = FakeNvml(root)
    except FileNotFoundError:
        return {}
    nvml.show(*(FakeGpu(energy_mj=10**6, bus=f"00000000:0{number}:00.0") for number in range(4)))
    return nvml.environment


def _row(name: str, process: "subprocess.Popen[bytes]", folder: Path, started: float) -> dict[str, Any]:
    used = cpu_seconds(process.pid) - started
    rows = [json.loads(line) for line in (folder / f"energy-{name}.jsonl").read_text().splitlines()]
    samples = [row for row in rows if row["event"] == "sample"]
    return {
        "node": name,
        "counters": [counter["name"] for counter in rows[0]["counters"]],
        "samples": len(samples),
        "cpu_s_per_sample": used / max(1, len(samples) - 1),
        "start_cpu_s": started,
        "peak_rss_mib": _status_kib(process.pid, "VmHWM") / 1024,
        "bytes_per_sample": len(json.dumps(samples[-1])) + 1,
    }


def cpu_seconds(pid: int) -> float:
    """CPU time of a process by the scheduler's clock: nanoseconds; /proc/PID/stat has hundredths of a second."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def _status_kib(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def show(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{row['node']:5} {', '.join(row['counters'])}\n"
        f"      {row['cpu_s_per_sample'] * 1e6:.0f} us of CPU a sample ({row['samples']} samples), "
        f"{row['cpu_s_per_sample'] / LIMIT:.0%} of the limit; start {row['start_cpu_s']:.2f} s, "
        f"peak {row['peak_rss_mib']:.1f} MiB, {row['bytes_per_sample'] * 86400 / 1e6:.0f} MB a day on disk"
        for row in found["nodes"]
    ]
    return "\n".join([f"limit: {LIMIT:.1%} of one core at one sample a second", *lines, found["method"]])
