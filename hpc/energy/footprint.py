"""From the energy of the nodes to the facility: other IT, cooling (PUE), water (WUE), carbon, embodied emissions.

Kept apart from the ledger: IT energy is what was drawn by nodes, everything here is derived from it with figures that
the site states, each with its source and year. What the site does not state is None; there are no defaults. The order
is that of ARCHER2's published method: other IT is a part of the nodes' energy, the plant a part of both.
"""

from dataclasses import dataclass, fields
from typing import Any

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
    it_carbon_kg: float | None
    """Carbon intensity x energy of the nodes alone; None unless the site states it."""
    carbon_kg: float | None
    """Carbon intensity x total energy; None unless the site states both."""
    embodied_kg: float | None
    """Emissions of making the nodes, by node-hours."""

    @property
    def emissions_g(self) -> float | None:
        """Grams CO2e of the electricity, of as much of the building as the site's figures reach; None without one."""
        kilograms = self.carbon_kg if self.carbon_kg is not None else self.it_carbon_kg
        return None if kilograms is None else 1e3 * kilograms

    def __add__(self, other: "Footprint") -> "Footprint":
        """Of two parts, where a figure that one of them lacks is unknown for both."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        sums: list[Any] = [None if a is None or b is None else a + b for a, b in pairs]
        return Footprint(*sums)


def footprint(energy_j: float, node_hours: float, facility: Facility) -> Footprint:
    """Footprint of `energy_j` joules drawn by nodes over `node_hours`."""
    stated = {name: figure.value for name, figure in facility.stated().items()}
    nodes = energy_j / JOULES_PER_KWH
    other = _times(nodes, stated.get("other_it_fraction"))
    it_total = nodes + (other or 0.0)
    plant = _times(it_total, stated["pue"] - 1 if "pue" in stated else None)
    total = it_total + plant if plant is not None else None
    kg_per_kwh = _times(stated.get("carbon_g_per_kwh"), 1e-3)
    return Footprint(
        it_kwh=nodes,
        other_it_kwh=other,
        plant_kwh=plant,
        total_kwh=total,
        water_l=_times(it_total, stated.get("wue_l_per_kwh")),
        it_carbon_kg=_times(nodes, kg_per_kwh),
        carbon_kg=_times(total, kg_per_kwh),
        embodied_kg=_times(_times(node_hours, 1e-3), stated.get("embodied_g_per_node_hour")),
    )


def _times(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


NAMES = {
    "other_it_fraction": "other IT",
    "pue": "PUE",
    "wue_l_per_kwh": "WUE",
    "carbon_g_per_kwh": "carbon intensity",
    "embodied_g_per_node_hour": "embodied emissions",
}
"""The facility's keys as a person says them."""


@dataclass(frozen=True)
class Line:
    """One row of a footprint, as a person reads it."""

    name: str
    value: float | None
    unit: str
    how: str
    """What it was derived from, or why it is not known."""
    source: str
    """Who states the figures that went in, and for which year; empty where nothing is stated."""


def lines(found: Footprint, node_hours: float, facility: Facility) -> list[Line]:
    """The footprint beyond the nodes, row by row, each with the statement it rests on."""
    stated = facility.stated()

    def line(name: str, value: float | None, unit: str, how: str, *needs: str) -> Line:
        missing = [need for need in needs if need not in stated]
        if missing:
            how = f"the site does not state its {' and '.join(NAMES[name] for name in missing)}"
        sources = dict.fromkeys(stated[need].words for need in needs) if not missing else {}
        return Line(name, value, unit, how, "; ".join(sources))

    def told(name: str) -> str:
        return f"{stated[name].value:g}" if name in stated else "?"

    it = "nodes and other IT" if "other_it_fraction" in stated else "nodes (other IT is not stated and not counted)"
    carbon, pue = f"{told('carbon_g_per_kwh')} g/kWh", told("pue")
    return [
        line("other IT", found.other_it_kwh, "kWh", f"{told('other_it_fraction')} x nodes", "other_it_fraction"),
        line("plant: cooling and losses", found.plant_kwh, "kWh", f"(PUE {pue} - 1) x {it}", "pue"),
        line("all of it", found.total_kwh, "kWh", f"PUE {pue} x {it}", "pue"),
        line("water", found.water_l, "L", f"{told('wue_l_per_kwh')} L/kWh x {it}", "wue_l_per_kwh"),
        line("carbon of the nodes", found.it_carbon_kg, "kg CO2e", f"{carbon} x nodes", "carbon_g_per_kwh"),
        line("carbon of all of it", found.carbon_kg, "kg CO2e", f"{carbon} x all of it", "carbon_g_per_kwh", "pue"),
        line(
            "embodied", found.embodied_kg, "kg CO2e",
            f"{told('embodied_g_per_node_hour')} g per node-hour x {node_hours:.4g} node-hours",
            "embodied_g_per_node_hour",
        ),
    ]  # fmt: skip
