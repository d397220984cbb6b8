"""What a table of formats has to show, and whether it does: loss by class of bits, and mixed against uniform bits."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpc.bench.shrink_rows import Row
from hpc.config import Quantize

EQUAL_SIZE = 0.02
"""Relative difference in bits up to which two artifacts count as equally large."""


@dataclass(frozen=True)
class Target:
    """Formats of so many bits a weight (of the matrices of layers) are to cost at most so much perplexity."""

    name: str
    above_bits: float
    most_bits: float
    most_ratio: float
    """Perplexity of the artifact / its source's."""


INT4 = Target("int4 class, at most 4.8 bits per weight: perplexity at most 2 % up", 3.5, 4.8, 1.02)
INT8 = Target("8 bits: perplexity at most 0.2 % up", 7.5, 9.0, 1.002)
TARGETS = (INT4, INT8)


@dataclass(frozen=True)
class Judged:
    """A target beside a model's rows."""

    target: str
    holds: bool | None
    """Whether the best format of the class keeps to it; None without one."""
    because: str

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return asdict(self)


def in_class(rows: Sequence[Row], target: Target) -> list[Row]:
    """Rows of a target's class whose cost is known, the best first."""
    known = [row for row in rows if _ratio(row) is not None and _is_of(row, target)]
    return sorted(known, key=lambda row: _ratio(row) or 0.0)


def judge(rows: Sequence[Row], target: Target) -> Judged:
    """Whether the best format of the class keeps to the target, and how many do."""
    members = in_class(rows, target)
    if not members:
        return Judged(target.name, None, "no format of this class was made and evaluated")
    best, keep = members[0], sum((_ratio(row) or 0.0) <= target.most_ratio for row in members)
    told = (
        f"best is {best.format}, {(_ratio(best) or 0.0) - 1:+.2%} at {best.value('matrix_bits_per_weight'):.2f} bits; "
        f"{keep} of {len(members)} formats keep to it"
    )
    return Judged(target.name, keep > 0, told)


def mixed_against_uniform(rows: Sequence[Row]) -> list[Judged]:
    """Each budget of bits beside uniform bits of the same size, rounding and groups. Less KL divergence wins."""
    found = []
    for mixed in rows:
        wanted = mixed.made_by
        if not isinstance(wanted, Quantize) or wanted.bits_per_weight is None:
            continue
        name = f"{mixed.format}: bits by what rounding does, against uniform bits of the same size"
        rivals = [row for row in rows if _is_uniform_twin(row, wanted) and _as_large(row, mixed)]
        ours, theirs = mixed.value("kl"), rivals[0].value("kl") if rivals else None
        if ours is None or theirs is None:
            found.append(Judged(name, None, mixed.refused or "no uniform format of the same size was made"))
            continue
        told = f"KL {ours:.4f} against {theirs:.4f} of {rivals[0].format}"
        ratios = _ratio(mixed), _ratio(rivals[0])
        if None not in ratios:
            told += f", perplexity {(ratios[0] or 0.0) - 1:+.2%} against {(ratios[1] or 0.0) - 1:+.2%}"
        found.append(Judged(name, ours < theirs, told))
    return found


def _ratio(row: Row) -> float | None:
    return row.value("perplexity_ratio")


def _is_of(row: Row, target: Target) -> bool:
    bits = row.value("matrix_bits_per_weight")
    return bits is not None and target.above_bits < bits <= target.most_bits


def _is_uniform_twin(row: Row, wanted: Quantize) -> bool:
    made = row.made_by
    return (
        isinstance(made, Quantize)
        and made.bits_per_weight is None
        and (made.method, made.format, made.group_size, made.symmetric)
        == (wanted.method, wanted.format, wanted.group_size, wanted.symmetric)
    )


def _as_large(row: Row, other: Row) -> bool:
    bits, others = row.value("matrix_bits_per_weight"), other.value("matrix_bits_per_weight")
    return bits is not None and others is not None and abs(bits - others) <= EQUAL_SIZE * others
