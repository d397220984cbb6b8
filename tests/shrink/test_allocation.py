"""Bits under a budget, against trying every choice."""

import itertools
import random

import pytest

from hpc.errors import ConfigError
from hpc.shrink.allocation import Unit, allocate, stored_bits


def test_stored_bits_count_scale_and_zero_point() -> None:
    assert stored_bits(4, 128, symmetric=True) == 4.125
    assert stored_bits(4, 32, symmetric=False) == 4 + 16 / 32 + 4 / 32


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_near_the_best_of_all_and_within_the_budget(seed: int) -> None:
    draw = random.Random(seed)
    units = {
        name: Unit(1000, {bits: weight * 4.0**-bits * draw.uniform(0.9, 1.1) for bits in (2, 3, 4, 6)})
        for name, weight in ((f"expert {number}", 10 ** draw.uniform(0, 3)) for number in range(6))
    }
    budget = draw.uniform(2.6, 5.5)

    def size(bits: tuple[int, ...]) -> float:
        return sum(stored_bits(count, 64, symmetric=True) for count in bits) / len(units)

    def error(bits: tuple[int, ...]) -> float:
        return sum(unit.errors[count] for unit, count in zip(units.values(), bits, strict=True))

    found = tuple(allocate(units, budget, 64, symmetric=True).values())
    assert size(found) <= budget
    everything = [bits for bits in itertools.product((2, 3, 4, 6), repeat=6) if size(bits) <= budget]
    uniform = max((bits for bits in everything if len(set(bits)) == 1), key=size)
    largest = max(unit.errors[2] for unit in units.values())
    assert error(found) <= error(uniform)
    assert error(found) <= error(min(everything, key=error)) + 0.1 * largest


def test_an_expert_that_counts_gets_the_bits_and_one_that_saw_nothing_the_fewest() -> None:
    unseen = Unit(1000, dict.fromkeys((2, 4, 8), 0.0))
    seen = Unit(1000, {2: 1.0, 4: 0.1, 8: 0.001})
    assert allocate({"a": unseen, "b": seen}, 5.2, 128, symmetric=True) == {"a": 2, "b": 8}


def test_a_budget_below_the_fewest_bits_is_refused_with_what_they_take() -> None:
    with pytest.raises(ConfigError, match=r"bits_per_weight = 2 is less than .* 2\.500: raise it, or raise group_size"):
        allocate({"a": Unit(10, {2: 1.0, 4: 0.1})}, 2.0, 32, symmetric=True)
