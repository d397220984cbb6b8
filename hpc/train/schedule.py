"""Learning rate as a pure function of the step."""

import math

from hpc.config import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (0 is the first of `steps`).

    cosine: arXiv:1608.03983 without restarts; wsd (warm-up, stable, linear decay): arXiv:2404.06395.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = schedule.min_lr_fraction
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        done = (step - schedule.warmup_steps) / max(1, steps - 1 - schedule.warmup_steps)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    decay_steps = max(1, round(schedule.decay_fraction * steps))
    left = steps - 1 - step
    return peak if left >= decay_steps else peak * (floor + (1 - floor) * left / decay_steps)
