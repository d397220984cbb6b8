"""Weights of a mixture in whole numbers: what makes its schedule exact (hpc/data/mixture.py)."""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

LONGEST_PERIOD = 100_000
"""Sequences after which the weights of a mixture must repeat; four decimals need at most 10,000."""


def mixture_parts(weights: Sequence[float]) -> list[int]:
    """Weights, as the decimal numbers that they are written as, in the smallest whole numbers. Raises ValueError."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = lcm(*(share.denominator for share in shares))
    if period > LONGEST_PERIOD:
        raise ValueError(
            f"the weights {', '.join(map(str, weights))} repeat only after {period:,} sequences: "
            "round them so that they add up to 1 with at most four decimals"
        )
    return [int(share * period) for share in shares]
