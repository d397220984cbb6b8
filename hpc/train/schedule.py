"""Learning rate as a pure function of the step."""

import math

from hpc.config import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (0 is the first of `steps`).

    cosine: arXiv:1608.03983 without restarts; wsd (warm-up, stable, linear decay): arXiv:2404.06395; jagged_cosine:
    arXiv:2307.05695, section 3: after each restart a linear warm-up from zero back to the cosine.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = schedule.min_lr_fraction
    if schedule.kind == "constant":
        return peak
    if schedule.kind in ("cosine", "jagged_cosine"):
        done = (step - schedule.warmup_steps) / max(1, steps - 1 - schedule.warmup_steps)
        rate = peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        return rate * _since_restart(schedule, step)
    decay_steps = max(1, round(schedule.decay_fraction * steps))
    left = steps - 1 - step
    return peak if left >= decay_steps else peak * (floor + (1 - floor) * left / decay_steps)


def _since_restart(schedule: Schedule, step: int) -> float:
    """Fraction of the cosine that a step has after the restarts of a jagged schedule; 1 without any."""
    every, warmup = schedule.restart_every_steps, schedule.restart_warmup_steps
    if every is None or step < every:
        return 1.0
    return min(1.0, (step % every + 1) / (warmup + 1))
