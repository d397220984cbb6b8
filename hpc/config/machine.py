"""Facts about the machines a chain runs on, as far as planning and the energy ledger need them.

`slurm.site.Site` adds what only the scheduler needs. Power and facility figures always carry their source.
"""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from hpc.config.base import Frozen


class PowerModel(Frozen):
    """A linear estimate of what a machine draws, for machines without a readable counter. Never called a measurement.

    power = cores x (idle + utilisation x (busy - idle)) + memory x dram_w_per_gib
    """

    cpu_idle_w_per_core: NonNegativeFloat
    """Watts of one logical core that does nothing."""

    cpu_busy_w_per_core: PositiveFloat
    """Watts of one logical core at full load."""

    dram_w_per_gib: NonNegativeFloat
    """Watts per GiB of installed memory."""

    accelerator_w: NonNegativeFloat = 0.0
    """Watts of one busy accelerator; used by the plan only (running accelerators are measured)."""

    source: str
    """Where the coefficients come from, with the date."""


class Facility(Frozen):
    """The building around the machine. Everything is unknown unless the site states it: there are no defaults."""

    other_it_fraction: NonNegativeFloat | None = None
    """Other IT (network, storage, login nodes) as a fraction of the nodes' energy."""

    pue: PositiveFloat | None = None
    """Power usage effectiveness: facility energy / IT energy."""

    wue_l_per_kwh: NonNegativeFloat | None = None
    """Water usage effectiveness, litres per kWh of IT energy."""

    carbon_g_per_kwh: NonNegativeFloat | None = None
    """Carbon intensity of the electricity, grams CO2e per kWh."""

    embodied_g_per_node_hour: NonNegativeFloat | None = None
    """Embodied emissions, grams CO2e per node-hour."""

    source: str | None = None
    """Who states these figures, and for which year."""


class Machine(Frozen):
    """One kind of node, and how fast it is expected to compute."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live. `auto` takes CUDA/ROCm (nccl) where there is one and the CPU (gloo) where there is not."""

    max_nodes: PositiveInt = 1
    """Nodes one job may use."""

    ranks_per_node: PositiveInt = 2
    """Worker processes per node: one per accelerator, or one per core on a machine without any."""

    memory_gib_per_rank: PositiveFloat
    """Memory one rank may fill (of the accelerator, or its share of the node's memory), GiB."""

    peak_flops_per_rank: PositiveFloat
    """Dense matrix-product rate of one rank at the precision used for training, FLOP/s."""

    expected_mfu: PositiveFloat
    """Fraction of the peak that whole-model training is expected to reach (model FLOPs utilisation)."""

    stage_overhead_s: NonNegativeFloat = 15.0
    """Seconds each stage spends on starting processes and importing libraries."""

    power: PowerModel
    """What the machine draws where nothing can be measured, and for planning."""

    source: str
    """Where speed and memory come from, with the date."""
