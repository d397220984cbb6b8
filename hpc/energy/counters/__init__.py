"""Which counters a node has, chosen so that they do not overlap, and what is left to an estimate or to nobody.

The cover rule (cover.py) picks from everything that can be read. Processors and memory that nothing covers are
estimated beside what is measured, with the site's power model; GPUs are never estimated. What remains is named in
`unmeasured`, so that a total is not taken for more than it is.
"""

from dataclasses import dataclass
from pathlib import Path

from hpc.energy.counters import amd_smi, hwmon, nvml, pm_counters, rapl
from hpc.energy.counters.base import Counter, Kind, Part, Reading, Scope
from hpc.energy.counters.cover import cover, overlap
from hpc.energy.counters.estimate import CpuEstimate, PowerCoefficients
from hpc.energy.counters.sysfs import sockets

__all__ = ["Counter", "Discovery", "Reading", "Scope", "discover"]


@dataclass(frozen=True)
class Discovery:
    """Counters to read and add up."""

    counters: list[Counter]
    notes: list[str]
    """What was found but cannot be used or is not added, and why."""
    unmeasured: list[str]
    """Parts of the node that draw power which no counter or estimate here covers."""


def discover(power_model: PowerCoefficients | None, root: Path = Path("/")) -> Discovery:
    """Find this node's counters below `root` (a fake tree in tests). Without a power model nothing is estimated."""
    node, notes = pm_counters.find(root)
    if node:
        return Discovery([*node], notes, [])  # a node meter covers everything: nothing else need be opened
    meters, meter_notes = hwmon.find(root)
    zones, zone_notes = rapl.find(root)
    nvidia, nvidia_notes, nvidia_missing = nvml.find(root)
    amd, amd_notes, amd_missing = amd_smi.find(root)
    if any(
        meter.scope == "module" for meter in meters
    ):  # they see every module; a guessed place might be the wrong one
        nvidia = [gpu for gpu in nvidia if gpu.is_placed]
    found: list[Counter] = [*meters, *zones, *nvidia, *amd]
    taken, left_out = cover(found)
    notes = [*notes, *meter_notes, *zone_notes, *nvidia_notes, *amd_notes, *left_out]
    if any(counter.scope == "node" for counter in taken):
        return Discovery(taken, notes, [])
    kinds: tuple[Kind, ...] = ("cpu", "dram")
    shares = {kind: _uncovered(taken, kind, root) for kind in kinds}
    missing = [*nvidia_missing, *amd_missing]
    if power_model is not None and any(shares.values()):
        taken = [CpuEstimate(power_model, shares["cpu"], shares["dram"]), *taken]
    else:
        missing = [*(kind for kind, share in shares.items() if share), *missing]
    return Discovery(taken, notes, [*missing, "network, storage, fans and power supply"])


def _uncovered(taken: list[Counter], kind: Kind, root: Path) -> float:
    """The share of the node's sockets whose processors or memory no counter covers."""
    numbers = set(sockets(root).values()) or _numbers(taken) or {0}
    wanted = [Part(kind, number) for number in numbers]
    return sum(not any(overlap([part], counter.parts) for counter in taken) for part in wanted) / len(wanted)


def _numbers(taken: list[Counter]) -> set[int]:
    """Sockets that the counters themselves name."""
    return {
        part.socket for counter in taken for part in counter.parts if part.kind == "cpu" and part.socket is not None
    }
