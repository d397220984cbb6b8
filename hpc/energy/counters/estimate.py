"""An estimate for processors and memory without a readable counter. Never called a measurement.

power = cores x (idle + utilisation x (busy - idle)) + memory x dram_w_per_gib, with the site's stated coefficients;
utilisation of all logical cores since the reading before (/proc/stat through psutil), integrated over time. Sockets or
memories that are measured are left out.
"""

import time
from typing import Protocol

import psutil

from hpc.energy.counters.base import Instrument, Reading, Scope


class PowerCoefficients(Protocol):
    """What the estimate needs of hpc.config.PowerModel."""

    @property
    def cpu_idle_w_per_core(self) -> float: ...
    @property
    def cpu_busy_w_per_core(self) -> float: ...
    @property
    def dram_w_per_gib(self) -> float: ...
    @property
    def source(self) -> str: ...


class CpuEstimate(Instrument):
    """Processors and memory of a node, or what of them is not measured, from their utilisation."""

    unit = "model"

    def __init__(self, model: PowerCoefficients, cpu_share: float = 1.0, dram_share: float = 1.0) -> None:
        kinds = [kind for kind, share in (("cpu", cpu_share), ("dram", dram_share)) if share]
        self.scope: Scope = "cpu+dram" if len(kinds) == 2 else "cpu" if cpu_share else "dram"
        self.provenance = f"estimated: {_what(cpu_share, dram_share)} and a power model ({model.source})"
        super().__init__(f"{'+'.join(kinds)} estimate", frozenset())  # it stands for what nothing else covers
        self._model = model
        self._cores = (psutil.cpu_count() or 1) * cpu_share
        self._memory_gib = psutil.virtual_memory().total / 2**30 * dram_share
        self._energy_j, self._power_w = 0.0, 0.0
        self._time = time.monotonic()
        self.open()

    def _take(self, began: float) -> list[str]:
        """Utilisation since the reading before, which the kernel counts through any gap."""
        utilisation = min(1.0, psutil.cpu_percent() / 100)
        model = self._model
        core = model.cpu_idle_w_per_core + utilisation * (model.cpu_busy_w_per_core - model.cpu_idle_w_per_core)
        self._power_w = self._cores * core + self._memory_gib * model.dram_w_per_gib
        self._energy_j += self._power_w * (began - self._time)
        self._time = began
        return []

    def _reading(self) -> Reading:
        return Reading(self._energy_j, self._power_w)


def _what(cpu_share: float, dram_share: float) -> str:
    """What the estimate rests on, and for how much of the node it stands."""
    cpu = "CPU utilisation" if cpu_share == 1 else f"CPU utilisation for {cpu_share:.0%} of the cores"
    dram = "installed memory" if dram_share == 1 else f"{dram_share:.0%} of the installed memory"
    return (
        cpu
        if cpu_share and dram_share == 1
        else " and ".join([*([cpu] if cpu_share else []), *([dram] if dram_share else [])])
    )
