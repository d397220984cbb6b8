"""NVIDIA GPUs through NVML (nvidia-ml-py): energy in millijoules since the driver was loaded, Volta and later.

No privilege is needed. All GPUs that NVML shows are read, whatever CUDA_VISIBLE_DEVICES says: the ledger is that of
the node, and an idle GPU draws power for the job that holds it. (Slurm with ConstrainDevices shows a job only its own.)

* On GH200 the energy counter covers the whole module, Grace included, while the power call is the GPU alone: its scope
  is `module`, and no meter of that Grace is added. Of GB200 and GB300 it is not known: taken for the same, and said.
* A GPU in MIG mode has no counter for a slice: said, not measured.
* Power fields of A100 and H100 look at a quarter of the time (arXiv:2312.02741): power is integrated only where there
  is no energy counter, before Volta.
* After a driver reload handles are void and the counter starts at zero.
"""

import time
from pathlib import Path
from typing import Any

from hpc.energy.counters.base import CumulativeCounter, Part, PowerMeter, Scope
from hpc.energy.counters.sysfs import socket_of_device

REOPEN_S = 30.0
"""Shortest time between two tries to initialise NVML again: it can take a second of CPU."""


class Nvml:
    """The library, initialised, and again when it lost the driver."""

    def __init__(self) -> None:
        import pynvml

        self.library: Any = pynvml
        pynvml.nvmlInit()
        self.generation = 0
        self._tried = float("-inf")

    def reopen(self) -> None:
        """Initialise again, at most every REOPEN_S seconds. Raises NVMLError."""
        now = time.monotonic()
        if now - self._tried < REOPEN_S:
            return
        self._tried = now
        self.library.nvmlInit()
        self.generation += 1


class _Gpu:
    """A GPU by its UUID, whose handle is looked up again after a driver reload."""

    def __init__(self, nvml: Nvml, index: int) -> None:
        self._nvml, self._generation = nvml, nvml.generation
        self._handle = nvml.library.nvmlDeviceGetHandleByIndex(index)
        self._uuid = nvml.library.nvmlDeviceGetUUID(self._handle)

    def ask(self, call: str) -> float:
        """One figure of this GPU. Raises NVMLError; unless it is just not supported, the next call has a new handle."""
        library = self._nvml.library
        if self._generation != self._nvml.generation:
            self._handle = library.nvmlDeviceGetHandleByUUID(self._uuid)
            self._generation = self._nvml.generation
        try:
            return float(getattr(library, call)(self._handle))
        except library.NVMLError as error:
            if error.value != library.NVML_ERROR_NOT_SUPPORTED:
                self._nvml.reopen()
            raise


class NvmlGpu(CumulativeCounter):
    """The energy counter of one GPU, or of the module it sits on."""

    unit = "mJ"

    def __init__(
        self, gpu: _Gpu, name: str, scope: Scope, parts: frozenset[Part], provenance: str, is_placed: bool = True
    ) -> None:
        self.scope, self.provenance, self._gpu = scope, provenance, gpu
        self.is_placed = is_placed
        """Whether the socket of a module is known. If not, it is guessed from the order of the GPUs."""
        super().__init__(name, parts)
        self.open()

    def _joules(self) -> float:
        return self._gpu.ask("nvmlDeviceGetTotalEnergyConsumption") / 1e3


class NvmlPower(PowerMeter):
    """The power of a GPU without an energy counter."""

    scope: Scope = "gpu"
    unit = "mW"
    provenance = "measured: NVML power, integrated at the sampling rate (no energy counter before Volta)"
    is_placed = True

    def __init__(self, gpu: _Gpu, name: str, parts: frozenset[Part]) -> None:
        self._gpu = gpu
        super().__init__(name, parts)
        self.open()

    def _watts(self) -> float:
        return self._gpu.ask("nvmlDeviceGetPowerUsage") / 1e3


def find(root: Path) -> tuple[list[NvmlGpu | NvmlPower], list[str], list[str]]:
    """GPUs that can be measured, notes, and the names of those that cannot."""
    try:
        nvml = Nvml()
        count = nvml.library.nvmlDeviceGetCount()
    except Exception:  # no package, no driver, or no GPU: the normal case on a CPU node
        return [], [], []
    found: list[NvmlGpu | NvmlPower] = []
    notes: list[str] = []
    unmeasured: list[str] = []
    for index in range(count):
        try:
            counter, note = _counter(nvml, index, root)
        except Exception as error:  # each library call may fail in a way of its own, and the other GPUs still count
            counter, note = None, f"NVML gpu{index}: {error}"
        if counter is None:
            unmeasured.append(f"gpu{index}")
        else:
            found.append(counter)
        if note:
            notes.append(note)
    return found, notes, unmeasured


def _counter(nvml: Nvml, index: int, root: Path) -> tuple[NvmlGpu | NvmlPower | None, str]:
    library, gpu, name = nvml.library, _Gpu(nvml, index), f"gpu{index}"
    handle = library.nvmlDeviceGetHandleByIndex(index)
    if _ask(library, "nvmlDeviceGetMigMode", handle, [0])[0]:
        return None, f"NVML {name} is in MIG mode, and a slice has no energy counter: not measured; ask for whole GPUs"
    model = str(_ask(library, "nvmlDeviceGetName", handle, ""))
    bus = getattr(_ask(library, "nvmlDeviceGetPciInfo", handle, None), "busId", "")
    socket = socket_of_device(root, str(bus)) if bus else None
    part = Part("gpu", socket, f"nvidia {index}")
    measured = "measured: NVML total energy counter"
    if not any(chip in model for chip in ("GH200", "GB200", "GB300")):
        try:
            return NvmlGpu(gpu, name, "gpu", frozenset({part}), measured), ""
        except library.NVMLError:
            return NvmlPower(gpu, name, frozenset({part})), ""
    # Where the kernel does not tell the socket, GPUs are in the order of their modules.
    place = index if socket is None else socket
    parts = frozenset({part, Part("cpu", place), Part("dram", place), Part("sysio", place)})
    note = "" if "GH200" in model else f"NVML {name} ({model}): its Grace is taken to be inside and is not added"
    measured = f"{measured} ({model}: the whole module, its Grace included)"
    return NvmlGpu(gpu, name, "module", parts, measured, is_placed=socket is not None), note


def _ask(library: Any, call: str, handle: Any, otherwise: Any) -> Any:
    """A question that old drivers or GPUs do not know."""
    try:
        return getattr(library, call)(handle)
    except library.NVMLError:
        return otherwise
