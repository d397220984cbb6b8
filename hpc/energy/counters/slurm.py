"""Slurm's own figure for the energy of a job: a cross-check of the ledger, never its source.

`sacct -X -n -P -o ConsumedEnergyRaw` gives joules of an allocation (its rows .batch, .extern, .0 are inside it), where
the site has an energy plugin (pm_counters, rapl, gpu, ipmi, xcc).
"""

CAVEAT = (
    "measured by Slurm per node: each job on a shared node gets all of it, and a job's first and last seconds may lack"
)
"""To be shown beside the figure."""

UNDERFLOW_J = 2.0**63
"""A counter that restarted makes Slurm subtract past zero in 64 unsigned bits: 1.8e19 J, a year of a large country."""


def consumed_energy_j(raw: str) -> float | None:
    """Joules from a ConsumedEnergyRaw column; None for what is no measurement: empty, 0 (no plugin), an underflow."""
    try:
        joules = float(raw.strip())
    except ValueError:
        return None
    return joules if 0 < joules < UNDERFLOW_J else None
