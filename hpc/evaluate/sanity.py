"""Whether a model makes any sense: its loss on a short English text, the same for all models.

A transposed or misnamed matrix leaves every shape as it was and the answers without sense. The figure goes into the
receipt of a reuse stage, where a gate can ask for what is known of the model (`smollm2.bits_per_byte < 1.0`). It does
not see one expert of many: files of which the digest is known do. The text is the beginning of the Declaration of
Independence (1776): every model has seen it, so that a sound one stands far below a damaged one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hpc.evaluate.loss import token_losses

TEXT = (
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which "
    "have connected them with another, and to assume among the powers of the earth, the separate and equal station to "
    "which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind requires "
    "that they should declare the causes which impel them to the separation. We hold these truths to be self-evident, "
    "that all men are created equal, that they are endowed by their Creator with certain unalienable Rights, that "
    "among these are Life, Liberty and the pursuit of Happiness."
)


@dataclass(frozen=True)
class Sense:
    """How well a text is predicted."""

    loss: float
    """Nats per token."""
    bits_per_byte: float


def judge(forward: Callable[[torch.Tensor], torch.Tensor], tokenizer: Any) -> Sense:
    """Predict the text. forward: ids (1, S) -> logits (1, S, V)."""
    ids = torch.tensor([tokenizer.encode(TEXT).ids])
    with torch.no_grad():
        losses = token_losses(forward(ids[:, :-1]), ids[:, 1:])
    return Sense(float(losses.mean()), float(losses.sum()) / math.log(2) / len(TEXT.encode()))
