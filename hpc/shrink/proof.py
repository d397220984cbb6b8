"""The reload proof: an artifact in its own runtime beside the model it was made from, on the same text.

What a library wrote is not believed. Both are opened in fresh processes (hpc/runtimes/remote.py), get the same ids, are
compared position by position, and continue the same prompts greedily. Tokenizers: hpc/runtimes/tokens.py.

Shape letters: S ids of one sequence, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpc.errors import ArtifactError
from hpc.runtimes.runner import Runner, Sampling


@dataclass(frozen=True)
class Agreement:
    """How closely an artifact follows its source, over all positions of all sequences."""

    kl: float
    """Mean KL(source || artifact), nats per token."""
    kl_worst: float
    """The largest of a position."""
    top1_agreement: float
    """Fraction of positions with the same most likely token."""
    source_loss: float
    """Mean negative log-likelihood of the next token, nats."""
    loss: float
    """Of the artifact."""
    tokens: int
    """Predicted tokens."""
    bytes: int
    """Bytes of text that they stand for."""

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the artifact over its source's; 1.02 is two percent worse."""
        return math.exp(self.loss - self.source_loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Of the artifact; None for ids that are no text."""
        return self.loss / math.log(2) * self.tokens / self.bytes if self.bytes else None


def compare(source: Runner, artifact: Runner, sequences: list[list[int]]) -> Agreement:
    """Give both the same sequences. Raises ArtifactError for logits that are no numbers or lack some tokens."""
    if artifact.vocab_size < source.vocab_size:
        raise ArtifactError(
            f"the artifact read back knows {artifact.vocab_size:,} tokens, its source {source.vocab_size:,}: refused"
        )
    divergences: list[npt.NDArray[np.float64]] = []
    same, lost, lost_there, tokens, size = 0, 0.0, 0.0, 0, 0
    for ids in sequences:
        p, q = (_log_softmax(runner.logits(ids)[:, : source.vocab_size]) for runner in (source, artifact))
        if not np.isfinite(q).all():
            raise ArtifactError("the artifact read back gives logits that are no numbers: it is refused")
        divergences.append((np.exp(p) * (p - q)).sum(-1))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        places, targets = np.arange(len(ids) - 1), np.array(ids[1:])
        lost += float(-p[places, targets].sum())
        lost_there += float(-q[places, targets].sum())
        tokens += len(targets)
        size += len(source.decode(ids[1:]).encode())
    kl = np.concatenate(divergences)
    return Agreement(
        kl=float(kl.mean()),
        kl_worst=float(kl.max()),
        top1_agreement=same / len(kl),
        source_loss=lost / tokens,
        loss=lost_there / tokens,
        tokens=tokens,
        bytes=size,
    )


KL_LIMIT = {2: 2.0, 3: 0.5, 4: 0.05, 5: 0.02, 6: 0.01, 7: 0.007, 8: 0.005, 16: 0.001}
"""Largest accepted KL divergence (nats per token) from the source, by bits, where a stage does not say."""


def check_agreement(agreement: Agreement, bits: int, accepted_kl: float | None) -> None:
    """Raises ArtifactError for an artifact that is too far from its source."""
    limit = KL_LIMIT[bits] if accepted_kl is None else accepted_kl
    if not agreement.kl <= limit:
        raise ArtifactError(
            f"the artifact read back differs from its source by KL {agreement.kl:.4f} nats per token (perplexity x "
            f"{agreement.perplexity_ratio:.3f}), accepted is {limit:g} at {bits} bits: it is refused; take more bits, "
            "or raise accepted_kl"
        )


@dataclass(frozen=True)
class Continued:
    """One prompt, continued by both, always with the most likely token."""

    prompt: str
    source: str
    artifact: str
    same_tokens: int
    """New tokens until the first difference."""


def continue_both(source: Runner, artifact: Runner, prompt: str, tokens: int) -> Continued:
    """Greedy text of both after a prompt."""
    ids = source.encode(prompt)
    first, second = (list(runner.stream(ids, tokens, Sampling())) for runner in (source, artifact))
    same = next(
        (n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(second)),
    )
    return Continued(prompt, source.decode(first), artifact.decode(second), same)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Over V, in double precision: (S, V) -> (S, V)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
