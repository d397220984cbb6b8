"""Every matrix of a shrunken model beside its source's, an expert's by itself.

The divergence of a whole model hardly moves when one expert of many is wrong; its matrix is far from its source then.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import ArtifactError

Named = tuple[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class MatrixErrors:
    """How far matrices read back are from their sources: root mean square, relative to the source's own."""

    worst: float
    worst_name: str
    experts: dict[str, float]
    """Of each expert's matrices, by name."""


def accepted_error(bits: float) -> float:
    """Largest accepted error of one matrix. Round-to-nearest makes 0.01 at 8 bits, 0.1 at 4 and 0.4 at 2; a matrix of
    which the scales are lost makes 1, another one in its place 1.4."""
    return min(0.9, 0.5 * 10 ** ((4 - bits) / 4))


def check_matrices(source: Iterable[Named], found: Iterable[Named], bits: float) -> MatrixErrors:
    """Compare two models' parameters by name, one of each in memory where both come in the same order.

    Raises ArtifactError that names the one that is wrong, missing or too many.
    """
    limit = accepted_error(bits)
    worst, worst_name, experts = 0.0, "", {}
    others, waiting = iter(found), dict[str, npt.NDArray[Any]]()
    for name, wanted in source:
        while name not in waiting:
            other, matrix = next(others, ("", None))
            if matrix is None:
                raise ArtifactError(f"the artifact read back has no {name}: it is refused")
            waiting[other] = matrix
        matrix = waiting.pop(name)
        if matrix.shape != wanted.shape:
            raise ArtifactError(
                f"the artifact read back has {name} as {matrix.shape}, not {wanted.shape}: it is refused"
            )
        error = relative_error(wanted, matrix)
        if not error <= limit:
            raise ArtifactError(
                f"the artifact read back has another {name}: {error:.2f} of its size away, accepted is {limit:.2f} at "
                f"{bits:g} bits: it is refused"
            )
        if ".experts." in name or "_exps." in name:
            experts[name] = error
        if error > worst:
            worst, worst_name = error, name
    extra = next(iter(waiting), None) or next(others, (None, None))[0]
    if extra is not None:
        raise ArtifactError(f"the artifact read back has {extra}, which its source has not: it is refused")
    return MatrixErrors(worst, worst_name, experts)


def relative_error(wanted: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """Root mean square of the difference over that of `wanted`; for zeros the largest difference."""
    size = float(np.linalg.norm(wanted))
    difference = np.asarray(found, dtype=np.float32) - np.asarray(wanted, dtype=np.float32)
    return float(np.linalg.norm(difference)) / size if size else float(np.abs(difference).max(initial=0.0))
