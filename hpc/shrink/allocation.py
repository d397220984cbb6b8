"""Bits for each part of a model under a size budget: where another bit saves most error.

Pure arithmetic. A part's error at each number of bits is measured before (hpc/shrink/sensitivity.py) and errors of
parts are added up, as if each disturbed the output by itself. Then the cheapest steps of each part's convex hull, best
first, are the optimum of the relaxed knapsack; what is lost to whole steps is less than one part.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hpc.errors import ConfigError


@dataclass(frozen=True)
class Unit:
    """A part that gets one number of bits: an expert, a dense feed-forward block, an attention block."""

    parameters: int
    errors: Mapping[int, float]
    """Bits -> error. Not negative."""
    matrices: tuple[str, ...] = ()
    """Names of its matrices, without `.weight`."""


@dataclass(frozen=True)
class Step:
    """From one number of bits to a higher one."""

    unit: str
    bits: int
    saved: float
    """Error a weight bit."""
    size: float
    """Bits of all weights of the unit."""


def stored_bits(bits: int, group_size: int, symmetric: bool) -> float:
    """Bits a weight on disk: its own, and its part of a group's 16-bit scale and of a zero point of `bits` bits."""
    return bits + (16 + (0 if symmetric else bits)) / group_size


def allocate(units: Mapping[str, Unit], budget: float, group_size: int, symmetric: bool) -> dict[str, int]:
    """Bits of each unit, so that all weights together take at most `budget` stored bits each.

    Raises ConfigError when the fewest bits take more.
    """
    chosen = {name: min(unit.errors) for name, unit in units.items()}
    total = sum(unit.parameters for unit in units.values())
    left = budget * total - sum(
        stored_bits(chosen[name], group_size, symmetric) * unit.parameters for name, unit in units.items()
    )
    if left < 0:
        least = budget - left / total
        raise ConfigError(
            f"bits_per_weight = {budget:g} is less than the fewest bits take with their scales, {least:.3f}: raise it, "
            "or raise group_size"
        )
    steps = [step for name, unit in units.items() for step in _hull(name, unit, group_size, symmetric)]
    full: set[str] = set()
    for step in sorted(steps, key=lambda step: -step.saved):
        if step.unit in full:
            continue
        if step.size > left:
            full.add(step.unit)  # later steps of this unit start where this one ends
            continue
        chosen[step.unit] = step.bits
        left -= step.size
    return chosen


def _hull(name: str, unit: Unit, group_size: int, symmetric: bool) -> list[Step]:
    """Steps along the lower convex hull of error over size, so that each saves less for a bit than the one before."""
    sizes = {bits: stored_bits(bits, group_size, symmetric) * unit.parameters for bits in unit.errors}
    steps: list[Step] = []
    at = min(unit.errors)
    while True:
        ahead = [bits for bits in unit.errors if bits > at and unit.errors[bits] < unit.errors[at]]
        if not ahead:
            return steps
        best = max(ahead, key=lambda bits: (unit.errors[at] - unit.errors[bits]) / (sizes[bits] - sizes[at]))
        size = sizes[best] - sizes[at]
        steps.append(Step(name, best, (unit.errors[at] - unit.errors[best]) / size, size))
        at = best


def with_experts_together(units: Mapping[str, Unit]) -> dict[str, Unit]:
    """All routed experts as one part, `experts`: compressed-tensors has one format for them, as transformers and
    vLLM's fused kernels read it."""
    experts = [unit for name, unit in units.items() if ".experts." in name]
    found = {name: unit for name, unit in units.items() if ".experts." not in name}
    if experts:
        errors = {bits: sum(unit.errors[bits] for unit in experts) for bits in experts[0].errors}
        matrices = tuple(matrix for unit in experts for matrix in unit.matrices)
        found["experts"] = Unit(sum(unit.parameters for unit in experts), errors, matrices)
    return found
