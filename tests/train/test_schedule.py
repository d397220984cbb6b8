"""Learning-rate schedules at the points that define them."""

import pytest

from hpc.config import Schedule
from hpc.train.schedule import learning_rate


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    schedule = Schedule(kind="constant", warmup_steps=4)
    assert [learning_rate(schedule, 1.0, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_starts_at_the_peak_passes_the_middle_and_ends_at_the_floor() -> None:
    schedule = Schedule(kind="cosine", warmup_steps=2, min_lr_fraction=0.1)
    assert learning_rate(schedule, 1.0, 2, 103) == pytest.approx(1.0)
    assert learning_rate(schedule, 1.0, 52, 103) == pytest.approx(0.55)
    assert learning_rate(schedule, 1.0, 102, 103) == pytest.approx(0.1)


def test_wsd_is_flat_until_its_last_part_and_then_falls_in_a_line() -> None:
    schedule = Schedule(kind="wsd", decay_fraction=0.2, min_lr_fraction=0.0)
    assert learning_rate(schedule, 1.0, 79, 100) == 1.0
    assert learning_rate(schedule, 1.0, 89, 100) == pytest.approx(0.5)
    assert learning_rate(schedule, 1.0, 99, 100) == 0.0
