"""A figure of a plan: value, unit, and how it was come by."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Quantity:
    """`how` begins with measured, derived, estimated or unknown; value is None when it cannot be known yet."""

    value: float | None
    unit: str
    how: str


def unknown(unit: str, why: str) -> Quantity:
    """A figure that cannot be told, and why."""
    return Quantity(None, unit, f"unknown: {why}")
