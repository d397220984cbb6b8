"""NVIDIA GPUs through NVML (nvidia-ml-py): energy in millijoules since the driver was loaded, Volta and later.

No privilege is needed. On GH200 the energy counter covers the whole module, Grace included, while the power call is
the GPU alone; the counter is what is taken, and a module's CPU must then not be added. With MIG it does not exist.
"""

import contextlib
from typing import Any

from hpc.energy.counters.base import Accumulator, Reading, Scope


class NvmlGpu:
    """One GPU."""

    scope: Scope = "gpu"
    provenance = "measured: NVML total energy counter"

    def __init__(self, library: Any, index: int) -> None:
        self._library = library
        self._handle = library.nvmlDeviceGetHandleByIndex(index)
        self.name = f"gpu{index}"
        self._accumulator = Accumulator()
        self._accumulator.add(self._joules())

    def _joules(self) -> float:
        return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def read(self) -> Reading:
        """Energy since the start; power as the mean since the reading before."""
        with contextlib.suppress(self._library.NVMLError):
            self._accumulator.add(self._joules())
        return self._accumulator.reading()


def find() -> tuple[list[NvmlGpu], list[str]]:
    """All GPUs of the node with an energy counter, and notes on those without."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or no GPU: the normal case on a CPU node
        return [], []
    gpus: list[NvmlGpu] = []
    notes: list[str] = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            gpus.append(NvmlGpu(pynvml, index))
        except pynvml.NVMLError as error:
            notes.append(f"NVML gpu{index}: no energy counter ({error})")
    return gpus, notes
