"""What failures of nodes cost a stage: expected failures, the best time between checkpoints, goodput.

Failures are taken as independent and equally likely at any time. Sources: Young 1974 (first order) and Daly 2006
(doi:10.1016/j.future.2004.11.016, higher order) for the interval; Meta's research clusters for why a node's mean time
between failures is divided by the nodes of a job (arXiv:2410.21680).
"""

from dataclasses import dataclass
from math import sqrt

HOUR = 3600.0


@dataclass(frozen=True)
class Failures:
    """Of one stage on nodes whose mean time between failures is stated."""

    expected: float
    """Failures of any node of the stage in its time without any."""
    interval_s: float
    """Between checkpoints, as configured."""
    best_interval_s: float
    """Of the least expected loss."""
    goodput: float
    """Part of the time that is not saving, replaying or starting again, with the configured interval."""
    best_goodput: float


def failures(
    seconds: float, nodes: int, node_mtbf_hours: float, interval_s: float, stall_s: float, restart_s: float
) -> Failures:
    """seconds: the stage without failures; stall_s: standing still for a checkpoint; restart_s: to start again."""
    mtbf_s = node_mtbf_hours * HOUR / nodes
    best = best_interval(stall_s, mtbf_s)
    return Failures(
        expected=seconds / mtbf_s,
        interval_s=interval_s,
        best_interval_s=best,
        goodput=goodput(interval_s, stall_s, restart_s, mtbf_s),
        best_goodput=goodput(best, stall_s, restart_s, mtbf_s),
    )


def best_interval(stall_s: float, mtbf_s: float) -> float:
    """Seconds of work between checkpoints (Daly 2006, eq. 20): sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / 18M) - d for a
    stall d and a mean time M, and M where d is 2 M or more. The first factor alone is Young's."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = stall_s / (2 * mtbf_s)
    return sqrt(2 * stall_s * mtbf_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - stall_s


def goodput(interval_s: float, stall_s: float, restart_s: float, mtbf_s: float) -> float:
    """1 - stalls - failures x (half an interval to do again + a start), to first order; not below 0."""
    lost = stall_s / (interval_s + stall_s) + (interval_s / 2 + restart_s) / mtbf_s
    return max(0.0, 1.0 - lost)
