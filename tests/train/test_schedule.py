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


def test_a_jagged_cosine_falls_to_almost_zero_and_climbs_back_to_the_cosine() -> None:
    schedule = Schedule(kind="jagged_cosine", warmup_steps=2, restart_every_steps=20, restart_warmup_steps=4)
    plain = Schedule(kind="cosine", warmup_steps=2)
    cosine = [learning_rate(plain, 1.0, step, 100) for step in range(100)]
    jagged = [learning_rate(schedule, 1.0, step, 100) for step in range(100)]
    assert jagged[:20] == cosine[:20]
    for restart in (20, 40, 60, 80):
        wanted = [cosine[restart + n] * (n + 1) / 5 for n in range(5)]
        assert jagged[restart : restart + 5] == pytest.approx(wanted)
        assert jagged[restart + 4 : restart + 20] == pytest.approx(cosine[restart + 4 : restart + 20])


def test_wsd_is_flat_until_its_last_part_and_then_falls_in_a_line() -> None:
    schedule = Schedule(kind="wsd", decay_fraction=0.2, min_lr_fraction=0.0)
    assert learning_rate(schedule, 1.0, 79, 100) == 1.0
    assert learning_rate(schedule, 1.0, 89, 100) == pytest.approx(0.5)
    assert learning_rate(schedule, 1.0, 99, 100) == 0.0
