"""Machines that a model may answer on: Apple's chips, the GPUs of hpc/plan/hardware.py, or any memory and bandwidth.

Apple's bandwidths and memory options, read 2026-11-28: Apple's announcements and specification pages as quoted in
huggingface/huggingface.js #1937 and packages/tasks/src/hardware.ts @ 033a6ee (options), en.wikipedia.org/wiki/Apple_M2
(M2, M2 Pro, M2 Max, M2 Ultra), macrumors.com (M3 Pro), nutechbrt.com and gamebastion.com on the M4 (M4 Pro, M4 Max,
M1 Ultra); M1, M1 Pro, M1 Max, M3, M3 Max, M3 Ultra and M4 from memory of the same pages. M3 Max and M4 Max have a
slower variant with fewer cores (300 and 410 GB/s): --bandwidth says so.

How much a Mac's GPU may use, Metal's recommendedMaxWorkingSetSize as programs printed it: 10,922.67 MB of 16 GiB
(abetlen/llama-cpp-python #687), 21,845.34 MB of 32 (ollama #434), 73,728 MB of 96 (ggml-org/llama.cpp #3213): two
thirds up to 36 GiB, three quarters above. Newer systems give more (11.84 of 16, AlexsJones/llmfit #754; 107.5 of 128,
antirez/ds4 #893), so this is the careful figure. `sudo sysctl iogpu.wired_limit_mb=N` raises it until the next start;
90 of 96 GiB were used for long (antirez/ds4 #46), which is what is taken as the end: 4 GiB stay for macOS, or 1/16.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hpc.errors import ConfigError
from hpc.plan import hardware
from hpc.plan.inference.formats import Kind
from hpc.plan.quantity import GIB

TURN = 36 * GIB
"""Up to this much unified memory the GPU gets two thirds of it."""


@dataclass(frozen=True)
class Machine:
    """Where a model would run."""

    name: str
    kind: Kind
    memory: float
    """Bytes: unified, of the card, or of the computer."""
    bandwidth: float | None
    """Bytes per second, by the data sheet; None where nobody said."""
    chip: str = ""
    """Of Apple's, or the GPU; empty where it is any."""

    @property
    def usable(self) -> float:
        """Bytes that a model may take without changing anything."""
        if self.kind == "apple":
            return self.memory * (2 / 3 if self.memory <= TURN else 3 / 4)
        return self.memory if self.kind == "gpu" else self.raised

    @property
    def raised(self) -> float:
        """Bytes that it may take at most: on a Mac with a raised limit; elsewhere the system keeps 2 GiB or 1/16."""
        if self.kind == "apple":
            return max(self.usable, self.memory - max(4 * GIB, self.memory / 16))
        return self.memory if self.kind == "gpu" else self.memory - max(2 * GIB, self.memory / 16)


@dataclass(frozen=True)
class Chip:
    """An Apple chip."""

    bandwidth_gb_s: float
    memory_gib: tuple[int, ...]


APPLE: Mapping[str, Chip] = {
    "M1": Chip(68.25, (8, 16)),
    "M1 Pro": Chip(200, (16, 32)),
    "M1 Max": Chip(400, (32, 64)),
    "M1 Ultra": Chip(800, (64, 128)),
    "M2": Chip(100, (8, 16, 24)),
    "M2 Pro": Chip(200, (16, 32)),
    "M2 Max": Chip(400, (32, 64, 96)),
    "M2 Ultra": Chip(800, (64, 128, 192)),
    "M3": Chip(100, (8, 16, 24)),
    "M3 Pro": Chip(150, (18, 36)),
    "M3 Max": Chip(400, (36, 48, 64, 96, 128)),
    "M3 Ultra": Chip(819, (96, 256, 512)),
    "M4": Chip(120, (16, 24, 32)),
    "M4 Pro": Chip(273, (24, 48, 64)),
    "M4 Max": Chip(546, (36, 48, 64, 128)),
}
LADDER = (("M2", 8), ("M2", 16), ("M2", 24), ("M2 Pro", 32), ("M2 Max", 64), ("M2 Max", 96), ("M2 Ultra", 192))
"""The M2 Macs that are shown when nothing is said; --memory alone means the one with so much."""


def machines(device: str | None, memory_gib: float | None, bandwidth: float | None) -> list[Machine]:
    """The machines meant by --device, --memory (GiB) and --bandwidth (bytes/s). ConfigError for what cannot be."""
    if device is not None:
        return _named(device, memory_gib, bandwidth)
    if memory_gib is None:
        return [_apple(chip, gib, bandwidth) for chip, gib in LADDER]
    known = {gib: chip for chip, gib in LADDER}
    if bandwidth is None and memory_gib in known:
        return [_apple(known[int(memory_gib)], memory_gib, None)]
    return [Machine(f"a machine with {memory_gib:g} GiB", "cpu", memory_gib * GIB, bandwidth)]


def _named(device: str, memory_gib: float | None, bandwidth: float | None) -> list[Machine]:
    plain = re.sub(r"apple|[^a-z0-9]", "", device.lower())
    chips = {name.lower().replace(" ", ""): name for name in APPLE}
    if plain in chips:
        chip = chips[plain]
        if memory_gib is None:
            return [_apple(chip, gib, bandwidth) for gib in APPLE[chip].memory_gib]
        return [_apple(chip, memory_gib, bandwidth)]
    try:
        found = hardware.find(device)
    except ConfigError:
        from hpc.config.near import nearest

        names = [*APPLE, *hardware.ACCELERATORS]
        raise ConfigError(
            f"--device {device!r} is not known{nearest(device, names)} For any other machine say "
            "--memory 16GiB --bandwidth 100GB/s"
        ) from None
    memory = found.memory_bytes if memory_gib is None else memory_gib * GIB
    return [Machine(found.name, "gpu", memory, bandwidth or found.hbm_bytes_per_s, found.name)]


def _apple(chip: str, gib: float, bandwidth: float | None) -> Machine:
    options = APPLE[chip].memory_gib
    if gib not in options:
        raise ConfigError(
            f"--memory {gib:g}GiB: an {chip} has {', '.join(map(str, options))} GiB: take one of these, or leave out "
            "--device and say --bandwidth"
        )
    return Machine(f"{chip} {gib:g} GiB", "apple", gib * GIB, bandwidth or 1e9 * APPLE[chip].bandwidth_gb_s, chip)


def memory_gib(text: str) -> float:
    """GiB of '16GiB', '16GB', '16' or '512MiB': memory is sold in powers of two, whatever the box calls them."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([mgt]?)i?b?\s*", text.lower())
    value = float(found[1]) * {"m": 1 / 1024, "t": 1024.0}.get(found[2], 1.0) if found else 0.0
    if not 0 < value < 2**20:
        raise ConfigError(f"--memory {text!r} is no amount of memory: write it as 16GiB")
    return value


def bandwidth(text: str) -> float:
    """Bytes per second of '100GB/s', '100' (GB/s) or '1.2TB/s'."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([mgt]?)b?(?:/s)?\s*", text.lower())
    value = float(found[1]) * {"m": 1e6, "t": 1e12}.get(found[2], 1e9) if found else 0.0
    if not 1e6 <= value <= 1e15:
        raise ConfigError(f"--bandwidth {text!r} is no memory bandwidth: write it as 100GB/s")
    return value
