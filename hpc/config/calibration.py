"""What a calibrated quantization looks at, and how much of it every expert must see."""

from typing import Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from hpc.config.base import Frozen


class Calibration(Frozen):
    """Held-in text of the `tokens` stages in `needs`, taken evenly from all over each; never the held-out part."""

    tokens: PositiveInt = 32_768
    """Tokens to begin with, over all texts. Memory grows with it: twice tokens x hidden_size numbers wait between two
    layers. A text that holds fewer is used whole."""

    seq_len: PositiveInt = Field(default=256, ge=16)
    """Tokens of a window."""

    iterations: PositiveInt = 200
    """Steps of signed gradient descent on the rounding of each layer (method auto_round). Time grows with it."""

    batch_size: PositiveInt = 8
    """Windows of one such step. Time grows with it, and the activations of a layer."""

    min_expert_tokens: NonNegativeInt = 0
    """Calibration tokens that every expert must see. While one saw fewer, the text is doubled up to `max_tokens`; an
    expert that is still short of it is rounded to nearest, and named in the receipt. 0 demands nothing."""

    max_tokens: PositiveInt | None = None
    """Up to how many tokens the text grows for experts that saw few; four times `tokens` when left out."""

    @property
    def most_tokens(self) -> int:
        """`max_tokens`, or what it is when left out."""
        return self.max_tokens or 4 * self.tokens

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.tokens < self.seq_len:
            raise ValueError(f"tokens = {self.tokens} is less than a window, seq_len = {self.seq_len}: raise tokens")
        if self.most_tokens < self.tokens:
            raise ValueError(f"max_tokens = {self.max_tokens} is less than tokens = {self.tokens}: raise max_tokens")
        return self
