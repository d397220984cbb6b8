"""How fast a runtime answers here, and what a token costs: a few seconds of writing, between two looks at the clock.

Joules are the node's, from its samplers (hpc/energy), so whatever else the node did in that time is in them.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from hpc.energy.curves import read_samples
from hpc.runtimes.remote import Remote
from hpc.runtimes.runner import Runner, Sampling


@dataclass(frozen=True)
class Writing:
    """What was measured."""

    began: float
    """Unix seconds."""
    ended: float
    tokens: int
    tokens_per_s: float | None
    """New tokens after each first one, by the clock of the runtime's process."""


def write_for_a_while(model: Runner, prompt: str, context_length: int, seconds: float) -> Writing:
    """Let a model write text nobody reads, for so many seconds, and time it."""
    ids = model.encode(prompt)
    clock = replace(model.writing) if isinstance(model, Remote) else None
    began, tokens, first_tokens, waited = time.time(), 0, 0, 0.0
    while time.time() - began < seconds:
        before, asked = tokens, time.time()
        for _ in model.stream(ids, context_length - len(ids), Sampling(temperature=0.8, seed=tokens)):
            if tokens == before:  # what the prompt takes is not writing
                first_tokens += 1
                waited += time.time() - asked
            tokens += 1
            if time.time() - began >= seconds:
                break
        if tokens == before:  # it has nothing to say to this prompt
            break
    ended = time.time()
    if clock is None:
        written, took = tokens - first_tokens, ended - began - waited
    else:
        assert isinstance(model, Remote)
        written, took = model.writing.tokens - clock.tokens, model.writing.seconds - clock.seconds
    return Writing(began, ended, tokens, written / took if written and took else None)


def joules_per_token(stage_directory: Path, attempt: int, writing: Writing) -> float | None:
    """Joules of the node in that time / new tokens; None where no counter or model gave a
    total, or the samples do not reach over all of it."""
    found = [one for one in read_samples(stage_directory) if one.attempt == attempt and one.has_total]
    lasted = writing.ended - writing.began
    if not found or not writing.tokens or any(one.seconds(writing.began, writing.ended) < lasted for one in found):
        return None
    return sum(one.between(writing.began, writing.ended) for one in found) / writing.tokens
