"""Matrix by matrix: rounding passes, another matrix does not."""

import numpy as np
import pytest

from hpc.errors import ArtifactError
from hpc.shrink.matrices import Named, accepted_error, check_matrices

RANDOM = np.random.default_rng(1)
SOURCE: list[Named] = [
    (f"layers.0.mlp.experts.{expert}.{part}.weight", RANDOM.standard_normal((8, 16)).astype(np.float32))
    for expert in range(3)
    for part in ("gate_proj", "up_proj")
]


def rounded(bits: int) -> list[Named]:
    """Round to nearest with one scale."""
    step = 2 * 3.5 / 2**bits
    return [(name, np.round(matrix / step) * step) for name, matrix in SOURCE]


@pytest.mark.parametrize("bits", [8, 6, 4, 3])
def test_rounding_passes(bits: int) -> None:
    found = check_matrices(SOURCE, rounded(bits), bits)
    assert 0 < found.worst < accepted_error(bits)
    assert len(found.experts) == 6


def damaged(how: str) -> list[Named]:
    found = rounded(4)
    if how == "zeroed":
        found[2] = (found[2][0], 0 * found[2][1])
    if how == "swapped":
        found[2], found[3] = (found[2][0], found[3][1]), (found[3][0], found[2][1])
    if how == "dropped":
        del found[3]
    if how == "more":
        found.append(("layers.0.mlp.experts.3.gate_proj.weight", found[0][1]))
    if how == "nan":
        found[1] = (found[1][0], found[1][1] * np.nan)
    return found


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("zeroed", "another layers.0.mlp.experts.1.gate_proj"),
        ("swapped", "another layers.0.mlp.experts.1.gate_proj"),
        ("dropped", "has no layers.0.mlp.experts.1.up_proj"),
        ("more", "which its source has not"),
        ("nan", "another layers.0.mlp.experts.0.up_proj"),
    ],
)
def test_damage_is_named(how: str, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        check_matrices(SOURCE, damaged(how), 4)
