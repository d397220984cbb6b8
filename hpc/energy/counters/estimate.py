"""An estimate for processors and memory without a readable counter. Never called a measurement.

power = cores x (idle + utilisation x (busy - idle)) + memory x dram_w_per_gib, with the site's stated coefficients;
utilisation of all logical cores since the reading before (/proc/stat through psutil), integrated over time.
"""

import time
from typing import Protocol

import psutil

from hpc.energy.counters.base import Reading, Scope


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


class CpuEstimate:
    """Processors and memory of a node, estimated from their utilisation."""

    name = "cpu+dram estimate"
    scope: Scope = "cpu+dram"

    def __init__(self, model: PowerCoefficients) -> None:
        self.provenance = f"estimated: CPU utilisation and a power model ({model.source})"
        self._model = model
        self._cores = psutil.cpu_count() or 1
        self._memory_gib = psutil.virtual_memory().total / 2**30
        self._energy_j = 0.0
        self._time = time.monotonic()
        psutil.cpu_percent()  # starts the interval

    def read(self) -> Reading:
        """Energy since the start; power of the interval since the reading before."""
        now = time.monotonic()
        utilisation = min(1.0, psutil.cpu_percent() / 100)
        model = self._model
        core = model.cpu_idle_w_per_core + utilisation * (model.cpu_busy_w_per_core - model.cpu_idle_w_per_core)
        power = self._cores * core + self._memory_gib * model.dram_w_per_gib
        self._energy_j += power * (now - self._time)
        self._time = now
        return Reading(self._energy_j, power)
