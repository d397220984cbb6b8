"""The next token, chosen from logits in the same way whatever the runtime."""

import numpy as np
import numpy.typing as npt

from hpc.runtimes.runner import Sampling


def choose(logits: npt.NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """One id from logits (V): the most likely, or drawn from the `top_k` most likely at `temperature`."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    count = min(sampling.top_k, len(logits))
    candidates = np.argpartition(logits, -count)[-count:]
    scores = logits[candidates].astype(np.float64) / sampling.temperature
    weights = np.exp(scores - scores.max())
    return int(random.choice(candidates, p=weights / weights.sum()))
