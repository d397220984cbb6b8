"""What every rank of the doctor's job does: look around, meet the others, move data, write, hear a signal.

Each rank keeps FOLDER/rank-R.json up to date after every step, so that a step which hangs or dies can be named.
"""

import json
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hpc.energy.counters import discover
from hpc.run.directory import write_json
from hpc.run.task import World
from slurm import commands
from slurm.network import free_port, own_address
from slurm.submit import count_accelerators, current_world

MEETING_S = 60
EXCHANGE_BYTES = 4 * 2**20
"""Sent from every rank to every other one, in one all-to-all."""
WRITE_BYTES = 64 * 2**20
"""Written and synced by every rank at once."""
SIGNAL_S = 20
WANDB = ("api.wandb.ai", 443)
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "submitit", "wandb")


@dataclass
class ProbeTask:
    """One rank of the doctor's job. Picklable."""

    folder: str
    network_interface: str | None
    nodes: int
    told: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> str:
        """Take every step; the first one that fails ends this rank's part, with its name and reason in the file."""
        heard = threading.Event()
        signal.signal(signal.SIGUSR2, lambda *_: heard.set())
        world, job = current_world("doctor")
        self.told.update(facts(world))
        steps: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            ("network interface", self._address),
            ("meeting on the shared file system", lambda: self._meet(world)),
            ("process group", lambda: self._connect(world)),
            ("clocks", lambda: self._clocks(world)),
            ("all-to-all", lambda: self._exchange(world)),
            ("shared file system", lambda: self._write(world)),
            ("power counters", lambda: self._counters(world)),
            ("Slurm from a compute node", lambda: self._slurm(world, job.job)),
            ("outgoing network", lambda: self._outgoing(world)),
            ("signals", lambda: self._signals(world, job.job, heard)),
        ]
        for name, step in steps:
            self._save(world, step=name)
            try:
                self.told.update(step())
            except Exception as error:
                self._save(world, failed=f"{type(error).__name__}: {error}".splitlines()[0])
                return "failed"
        self._save(world, step="", ended=time.time())
        return "done"

    def _save(self, world: World, **more: Any) -> None:
        self.told.update(more)
        write_json(Path(self.folder) / f"rank-{world.rank}.json", self.told)

    def _address(self) -> dict[str, Any]:
        address, interface = own_address(self.network_interface, is_alone=self.nodes == 1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        return {"address": address, "interface": interface}

    def _meet(self, world: World) -> dict[str, Any]:
        place, address = Path(self.folder) / "meeting.json", self.told["address"]
        if world.is_first:
            write_json(place, {"address": address, "port": free_port(address)})
        deadline = time.monotonic() + MEETING_S
        while not place.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"what rank 0 wrote was not seen after {MEETING_S} s")
            time.sleep(0.05)
        meeting = json.loads(place.read_text())
        os.environ.update(MASTER_ADDR=meeting["address"], MASTER_PORT=str(meeting["port"]))
        return {}

    def _connect(self, world: World) -> dict[str, Any]:
        import torch

        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
        backend = "nccl" if has_gpu else "gloo"
        began = time.monotonic()
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=120))
        torch.distributed.barrier()
        name = torch.cuda.get_device_name() if has_gpu else None
        return {"backend": backend, "connect_s": time.monotonic() - began, "gpu": name}

    def _clocks(self, world: World) -> dict[str, Any]:
        """Seconds by which this node's clock is ahead of rank 0's; the round trip bounds the error."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        ahead: list[float] = []
        for _ in range(5):
            torch.distributed.barrier()
            before = time.time()
            now = torch.tensor([time.time()], dtype=torch.float64, device=device)
            torch.distributed.broadcast(now, 0)
            after = time.time()
            ahead.append((before + after) / 2 - float(now))
        return {"clock_ahead_s": min(ahead, key=abs)}

    def _exchange(self, world: World) -> dict[str, Any]:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        count = EXCHANGE_BYTES // 4
        mine = torch.arange(world.size, device=device, dtype=torch.float32).repeat_interleave(count)
        mine += 1000 * world.rank
        theirs = torch.empty_like(mine)
        seconds = []
        for _ in range(5):
            torch.distributed.barrier()
            began = time.monotonic()
            torch.distributed.all_to_all_single(theirs, mine)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - began)
        wanted = 1000 * torch.arange(world.size, device=device, dtype=torch.float32) + world.rank
        if not torch.equal(theirs.view(world.size, count)[:, 0], wanted):
            raise RuntimeError("the data that arrived are not those that were sent")
        moved = EXCHANGE_BYTES * (world.size - 1)
        return {"all_to_all_bytes_per_s": moved / sorted(seconds)[2]}

    def _write(self, world: World) -> dict[str, Any]:
        import torch

        folder = Path(self.folder) / "files"
        folder.mkdir(exist_ok=True)
        torch.distributed.barrier()
        began = time.monotonic()
        staging, final = folder / f".{world.rank}", folder / f"{world.rank}.bin"
        with staging.open("wb") as file:
            for _ in range(16):
                file.write(os.urandom(2**20) * (WRITE_BYTES // 16 // 2**20))
            file.flush()
            os.fsync(file.fileno())
        rate = WRITE_BYTES / (time.monotonic() - began)
        staging.rename(final)
        torch.distributed.barrier()
        began = time.monotonic()
        wanted = {folder / f"{rank}.bin" for rank in range(world.size)}
        while not all(path.exists() and path.stat().st_size == WRITE_BYTES for path in wanted):
            if time.monotonic() - began > 30:
                raise TimeoutError("files that other ranks renamed were not seen whole after 30 s")
            time.sleep(0.01)
        seen = time.monotonic() - began
        torch.distributed.barrier()
        final.unlink()
        return {"write_bytes_per_s": rate, "rename_seen_s": seen}

    def _counters(self, world: World) -> dict[str, Any]:
        if world.local_rank:
            return {}
        found = discover(None)
        names = sorted({counter.name for counter in found.counters})
        return {"power_counters": names, "power_notes": found.notes, "power_unmeasured": found.unmeasured}

    def _slurm(self, world: World, job: str) -> dict[str, Any]:
        if not world.is_first:
            return {}
        text = commands.call("scontrol", "show", "job", job).stdout
        return {"job_requeue": "Requeue=1" in text, "job_end": commands.end_time(job)}

    def _outgoing(self, world: World) -> dict[str, Any]:
        if not world.is_first:
            return {}
        try:
            socket.create_connection(WANDB, timeout=5).close()
        except OSError as error:
            return {"wandb": False, "wandb_reason": str(error)}
        return {"wandb": True}

    def _signals(self, world: World, job: str, heard: threading.Event) -> dict[str, Any]:
        """Rank 0 signals the job once all ranks wait for it: no collective is under way when they leave."""
        deadline = time.monotonic() + SIGNAL_S
        if world.is_first:
            while (
                any(row["step"] != "signals" for row in read_ranks(Path(self.folder))) and time.monotonic() < deadline
            ):
                time.sleep(0.05)
            commands.call("scancel", "--signal=USR2", job)
        while not heard.is_set() and time.monotonic() < deadline + SIGNAL_S:
            time.sleep(0.05)
        return {"signal_heard": heard.is_set()}


def facts(world: World) -> dict[str, Any]:
    """What this rank sees without the others."""
    mask = os.umask(0)
    os.umask(mask)
    return {
        "rank": world.rank, "size": world.size, "node": world.node, "local_rank": world.local_rank,
        "python": platform.python_version(), "machine": platform.machine(), "umask": f"{mask:03o}",
        "cpus": len(os.sched_getaffinity(0)), "threads": os.environ.get("OMP_NUM_THREADS"),
        "accelerators": count_accelerators(), "versions": {name: _version(name) for name in PACKAGES},
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read_ranks(folder: Path) -> list[dict[str, Any]]:
    """What the ranks of a job have told so far, in the order of ranks."""
    found = [row for path in folder.glob("rank-*.json") for row in [json.loads(path.read_text())]]
    return sorted(found, key=lambda row: int(row["rank"]))
