"""Facts about the machines a chain runs on, as far as planning and the energy ledger need them.

`slurm.site.Site` adds what only the scheduler needs. Power and facility figures always carry their source.
"""

from typing import Any, Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

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

    node_idle_w: PositiveFloat | None = None
    """Watts of a whole node that does nothing, where the site states them."""

    node_busy_w: PositiveFloat | None = None
    """Watts of a whole node in training, where the site states them: the plan then takes these and no model of its
    parts."""

    source: str
    """Where the coefficients come from, with the date."""


class Stated(Frozen):
    """A figure that somebody states about a building. In YAML a plain number, or {value, source, year}."""

    value: NonNegativeFloat
    """The figure, in the unit that its key names."""

    source: str | None = None
    """Who states it, and where; the facility's `source` when left out."""

    year: PositiveInt | None = None
    """The year that it is about; the facility's `year` when left out."""

    @property
    def words(self) -> str:
        """Who states it, for which year."""
        source = self.source or "source not stated"
        return f"{source}, {self.year}" if self.year and str(self.year) not in source else source


class Facility(Frozen):
    """The building around the machine. Everything is unknown unless the site states it: there are no defaults.

    Each figure is a number, or {value, source, year} where it comes from elsewhere than the others.
    """

    other_it_fraction: Stated | None = None
    """Other IT (network, storage, login nodes) as a fraction of the nodes' energy."""

    pue: Stated | None = None
    """Power usage effectiveness: facility energy / IT energy, 1 or more."""

    wue_l_per_kwh: Stated | None = None
    """Water usage effectiveness, litres per kWh of IT energy."""

    carbon_g_per_kwh: Stated | None = None
    """Carbon intensity of the electricity, grams CO2e per kWh. It changes by the hour and the year: give the year."""

    embodied_g_per_node_hour: Stated | None = None
    """Emissions of making the machine, grams CO2e per node-hour of its life."""

    location: str | None = None
    """Where the building is, such as `Edinburgh, UK`: the model card repeats it beside the carbon."""

    source: str | None = None
    """Who states the figures that name no source of their own."""

    year: PositiveInt | None = None
    """The year of the figures that name none of their own."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """A plain number is a figure; what it does not say about itself the facility says."""
        if not isinstance(values, dict):
            return values
        common = {key: values[key] for key in ("source", "year") if values.get(key) is not None}
        filled = dict(values)
        for name in STATED:
            figure = values.get(name)
            if isinstance(figure, (int, float, str)):
                filled[name] = {"value": figure, **common}
            elif isinstance(figure, dict):
                filled[name] = {**common, **{key: value for key, value in figure.items() if value is not None}}
        return filled

    @model_validator(mode="after")
    def _check_pue(self) -> Self:
        if self.pue is not None and self.pue.value < 1:
            raise ValueError(
                f"pue is {self.pue.value:g}, but a building draws at least what its IT does: give 1 or more"
            )
        return self

    def stated(self) -> dict[str, Stated]:
        """Name -> figure, of what is stated."""
        return {name: figure for name in STATED if (figure := getattr(self, name)) is not None}


STATED = ("other_it_fraction", "pue", "wue_l_per_kwh", "carbon_g_per_kwh", "embodied_g_per_node_hour")
"""The facility's figures."""


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

    accelerator: str | None = None
    """Name of the accelerator of a rank as its data sheet is known to the plan (H100, GH200, MI250X), for its step
    time."""

    link_bytes_per_s: PositiveFloat | None = None
    """Between the ranks of one node, of each rank, one direction, bytes/s."""

    network_bytes_per_s: PositiveFloat | None = None
    """Between nodes, all ports of a node together, one direction, bytes/s."""

    storage_bytes_per_s: PositiveFloat | None = None
    """What one job writes to the file system of its run directory, bytes/s; `bench checkpoint` measures it."""

    node_mtbf_hours: PositiveFloat | None = None
    """Hours between two failures of one node, in the mean."""

    power: PowerModel
    """What the machine draws where nothing can be measured, and for planning."""

    source: str
    """Where speed and memory come from, with the date."""
