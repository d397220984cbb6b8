"""From the energy of the nodes to the facility: other IT, cooling (PUE), water (WUE), carbon, embodied emissions.

Kept apart from the ledger: IT energy is what was drawn by nodes, everything here is derived from it with figures that
the site states. What the site does not state is None; there are no defaults.
"""

from dataclasses import dataclass

from hpc.config import Facility

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Footprint:
    """All derived from IT energy and the site's statements."""

    it_kwh: float
    """Energy of the nodes."""
    other_it_kwh: float | None
    """Network, storage and other IT that the nodes' share stands for."""
    plant_kwh: float | None
    """Cooling and losses: (PUE - 1) x (nodes + other IT)."""
    total_kwh: float | None
    """All of it; None unless the site states PUE."""
    water_l: float | None
    """WUE x energy of nodes and other IT."""
    carbon_kg: float | None
    """Carbon intensity x total energy; None unless the site states both."""
    embodied_kg: float | None
    """Emissions of making the nodes, by node-hours."""


def footprint(energy_j: float, node_hours: float, facility: Facility) -> Footprint:
    """Footprint of `energy_j` joules drawn by nodes over `node_hours`."""
    nodes = energy_j / JOULES_PER_KWH
    other = nodes * facility.other_it_fraction if facility.other_it_fraction is not None else None
    it_total = nodes + (other or 0.0)
    plant = it_total * (facility.pue - 1) if facility.pue is not None else None
    total = it_total + plant if plant is not None else None
    intensity = facility.carbon_g_per_kwh
    embodied = facility.embodied_g_per_node_hour
    return Footprint(
        it_kwh=nodes,
        other_it_kwh=other,
        plant_kwh=plant,
        total_kwh=total,
        water_l=it_total * facility.wue_l_per_kwh if facility.wue_l_per_kwh is not None else None,
        carbon_kg=total * intensity / 1e3 if total is not None and intensity is not None else None,
        embodied_kg=embodied * node_hours / 1e3 if embodied is not None else None,
    )
