"""Fit the constants of the step-time model to published runs, towards their priors. Writes hpc/plan/step_time.json.

Gauss-Newton on log(predicted / measured) with the logarithms of the constants as unknowns. A source counts as the
square root of its rows, so that one long table does not outvote all others, and large residuals count in proportion,
not squared: a wrong row pulls like any other. Each constant is held to its prior by its own width: what was measured
elsewhere moves little, what was assumed moves freely, and what the rows say nothing about stays where it was.
"""

from collections import Counter
from collections.abc import Sequence
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from hpc.bench.plan_rows import PUBLISHED, Row, predicted, read
from hpc.plan.constants import Constants, as_dict, constants, keep, names
from hpc.plan.step_time import step_time

ASSUMED_WIDTH = 0.35
"""Standard deviation of a prior's logarithm: a factor of 1.4 for what was assumed."""
WIDTHS = {
    **dict.fromkeys(("gemm_ampere", "gemm_hopper", "fp8_hopper", "gemm_cdna3", "bubble"), 0.08),
    "mamba_bytes": 1.5,
}
"""8 % for what was measured elsewhere; almost free for what nothing is known about."""
ERROR_WIDTH = 0.12
"""Residuals below this count squared, larger ones in proportion."""
STEP = 1e-3
ROUNDS = 12


def fit(rows: Sequence[Row], start: Constants | None = None) -> Constants:
    """The constants that predict the rows best."""
    keys = names()
    priors = np.array([log(value) for value in as_dict(Constants()).values()])
    widths = np.array([WIDTHS.get(key, ASSUMED_WIDTH) for key in keys])
    counts = Counter(row.source for row in rows)
    weights = np.array([1 / sqrt(sqrt(counts[row.source])) for row in rows])
    point = np.array([log(value) for value in as_dict(start or Constants()).values()])
    for _ in range(ROUNDS):
        now = _residuals(rows, point)
        jacobian = np.empty((len(rows), len(keys)))
        for column in range(len(keys)):
            moved = point.copy()
            moved[column] += STEP
            jacobian[:, column] = (_residuals(rows, moved) - now) / STEP
        robust = weights / (ERROR_WIDTH * np.sqrt(1 + (now / (2 * ERROR_WIDTH)) ** 2))
        left = np.vstack([jacobian * robust[:, None], np.diag(1 / widths)])
        right = np.concatenate([-now * robust, (priors - point) / widths])
        change = np.linalg.lstsq(left, right, rcond=None)[0]
        point = point + np.clip(change, -0.5, 0.5)
        if np.abs(change).max() < 1e-3:
            break
    return constants({key: exp(value) for key, value in zip(keys, point, strict=True)})


def _residuals(rows: Sequence[Row], point: np.ndarray) -> np.ndarray:
    """log(predicted / measured) of each row."""
    c = constants({key: exp(value) for key, value in zip(names(), point, strict=True)})
    return np.array([log(predicted(row, _seconds(row, c)) / (row.measured or 1.0)) for row in rows])


def _seconds(row: Row, c: Constants) -> float:
    assert row.shape is not None
    assert row.layout is not None
    assert row.accelerator is not None
    return step_time(row.shape, row.layout, row.accelerator, c).seconds


def write(path: Path = PUBLISHED) -> None:
    """Fit on all rows, and on all but each source and each accelerator; write the file that the estimator reads."""
    scored = [row for row in read(path) if row.reason is None]
    everything = fit(scored)
    found: dict[str, Any] = {"all": _rounded(everything), "without_source": {}, "without_hardware": {}}
    for source in sorted({row.source for row in scored}):
        found["without_source"][source] = _rounded(fit([r for r in scored if r.source != source], everything))
    for name in sorted({row.accelerator.name for row in scored if row.accelerator}):
        others = [r for r in scored if r.accelerator and r.accelerator.name != name]
        found["without_hardware"][name] = _rounded(fit(others, everything))
    keep(found)


def _rounded(c: Constants) -> dict[str, float]:
    return {key: float(f"{value:.4g}") for key, value in as_dict(c).items()}
