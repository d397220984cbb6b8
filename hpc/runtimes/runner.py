"""What every runtime can do with an artifact: tokenize, give logits, write text. One door per runtime implements it.

Shape letters: S ids of one sequence, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 40
    """Only these many most likely tokens may be drawn."""
    seed: int = 0


class Runner(Protocol):
    """One artifact, loaded by its runtime in this process."""

    vocab_size: int
    """V of `logits`, padding included."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text, without adding a beginning-of-text token; `special` reads control tokens in it as such."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens left out."""
        ...

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits (S, V) at every position of one sequence, by the runtime's own arithmetic, from an empty cache."""
        ...

    def stream(self, ids: list[int], max_tokens: int, sampling: Sampling) -> Iterator[int]:
        """New ids after the prompt `ids`, one by one as they are made, with the runtime's cache.

        Ends after `max_tokens` or before an end-of-generation token, which is not given out.
        """
        ...

    def chat_prompt(self, messages: list[dict[str, str]]) -> str | None:
        """The artifact's own chat template over `{"role", "content"}` messages up to the answer; None without one."""
        ...

    def memory_bytes(self) -> int | None:
        """Bytes of weights that the runtime holds in memory (measured by it); None where it does not tell."""
        ...
