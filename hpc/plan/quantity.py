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


def amount(value: float | None) -> str:
    """9.4M, 1.2T; a dash for None."""
    if value is None:
        return "-"
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
