"""Which counters a node has, chosen so that they do not overlap.

The cover rule: the whole node if its meter can be read; else processor packages with their memory, and GPUs; and
where no processor counter can be read, an estimate for processors and memory beside measured GPUs.
"""

from dataclasses import dataclass
from pathlib import Path

from hpc.energy.counters import nvml, pm_counters, rapl
from hpc.energy.counters.base import Counter, Reading, Scope
from hpc.energy.counters.estimate import CpuEstimate, PowerCoefficients

__all__ = ["Counter", "Discovery", "Reading", "Scope", "discover"]


@dataclass(frozen=True)
class Discovery:
    """Counters to read, and what was found but cannot be used."""

    counters: list[Counter]
    notes: list[str]


def discover(power_model: PowerCoefficients | None, root: Path = Path("/")) -> Discovery:
    """Find this node's counters below `root` (a fake tree in tests). Without a power model nothing is estimated."""
    node, notes = pm_counters.find(root)
    if node:
        return Discovery([*node], notes)
    zones, rapl_notes = rapl.find(root)
    gpus, gpu_notes = nvml.find()
    notes = [*notes, *rapl_notes, *gpu_notes]
    counters: list[Counter] = [*zones, *gpus]
    if not any(zone.scope == "package" for zone in zones) and power_model is not None:
        counters = [CpuEstimate(power_model), *gpus]
    return Discovery(counters, notes)
