"""Two models that should compute the same: how far apart their logits are.

In single precision a deep model does not even agree with itself to the bit of a good merge (SmolLM2, 30 layers: 2e-4 on
logits up to 34, of which 1.5e-5 remain in double precision: the rounding of the weights). Models that memory allows are
therefore compared in double precision, and judged by the difference relative to the largest logit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ACCEPTED = 1e-5
"""Largest difference of logits, relative to the largest one, of two models that are called the same."""

DOUBLE_LIMIT = 2**29
"""Parameters up to which a model is compared in double precision (4 GiB of them)."""


@dataclass(frozen=True)
class Difference:
    """Of the logits of two models on the same ids."""

    absolute: float
    """Largest difference."""
    relative: float
    """The same over the largest logit."""
    precision: str
    """What the logits were computed in: float64 or float32."""

    @property
    def accepted(self) -> bool:
        """Whether both may be called the same model; never for NaN."""
        return self.relative <= ACCEPTED

    def __str__(self) -> str:
        return f"{self.absolute:.2e} ({self.relative:.1e} of the largest, accepted {ACCEPTED:.0e})"


def exact_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits (B, S, V) of a transformers or peft model in fp32 on ids (B, S), in double precision where memory allows.

    The model is left in fp32; its experts are computed one by one, as grouped products exist in fp32 and below only.
    """
    grouped = model.config._experts_implementation
    model.eval()
    model.set_experts_implementation("eager")
    try:
        if model.num_parameters() <= DOUBLE_LIMIT:
            model.double()
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits.clone()
    finally:
        model.float()
        model.set_experts_implementation(grouped)
    return logits


def difference(expected: Tensor, found: Tensor) -> Difference:
    """How far `found` is from `expected`, both (B, S, V) from `exact_logits`."""
    absolute = float((found - expected).abs().max())
    return Difference(absolute, absolute / float(expected.abs().max()), str(expected.dtype).removeprefix("torch."))
