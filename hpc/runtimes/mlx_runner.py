"""The door to MLX at run time: a model folder in MLX's layout, read and run by mlx-lm as any of its users would.

On a Mac that is the GPU (Metal), on Linux the CPU: a proof that a folder is right, no measure of a laptop. Not called
mlx.py: transformers takes whatever `mlx` it finds first on the path for the library.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import ArtifactError, ConfigError, DataError
from hpc.runtimes.runner import Sampling


def require() -> None:
    """Raise ConfigError, with the way to get them, where mlx or mlx-lm is not installed. Loads neither."""
    missing = [name for name in ("mlx", "mlx_lm") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"MLX folders need {missing[0]}, which is not installed: pip install 'greenmoe[mlx]'")


class Mlx:
    """`Runner`: the artifact's packed weights times activations in its own precision on a GPU, in float32 on a CPU.

    On a CPU MLX has no product of unpacked experts in 16 bits, and its other products in 16 bits are 8 to 30 times
    slower than in 32. Nor is anything compiled there: MLX calls the C++ compiler for it, and fails without one.
    """

    def __init__(self, folder: Path) -> None:
        """Load a folder. Raises ArtifactError where mlx-lm finds a tensor missing or left over, or no model at all."""
        require()
        import mlx.core as mx
        from mlx_lm import load

        if not (folder / "config.json").is_file():
            raise ArtifactError(f"{folder} is not an MLX model: it has no config.json")
        self._mx: Any = mx
        before = mx.get_active_memory()
        try:
            self._model, self._tokenizer, config = load(
                str(folder), tokenizer_config={"trust_remote_code": False}, return_config=True
            )
        except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
            raise ArtifactError(f"{folder}: mlx-lm cannot load it ({error})") from None
        self._memory = int(mx.get_active_memory() - before)
        if mx.default_device() == mx.cpu:
            mx.disable_compile()
            self._model.set_dtype(mx.float32)
        self.vocab_size = int(config["vocab_size"])

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """As in Runner."""
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)
        return [int(token) for token in ids]

    def decode(self, ids: list[int]) -> str:
        """As in Runner."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """As in Runner."""
        return np.array(self._model(self._mx.array([ids]))[0].astype(self._mx.float32))

    def stream(self, ids: list[int], max_tokens: int, sampling: Sampling) -> Iterator[int]:
        """As in Runner."""
        from mlx_lm.generate import generate_step
        from mlx_lm.sample_utils import make_sampler

        self._mx.random.seed(sampling.seed)
        top_k = sampling.top_k if sampling.top_k < self.vocab_size else 0  # 0: all of them
        steps = generate_step(
            self._mx.array(ids),
            self._model,
            max_tokens=max_tokens,
            sampler=make_sampler(sampling.temperature, top_k=top_k),
        )
        for token, _ in steps:
            if int(token) in self._tokenizer.eos_token_ids:
                return
            yield int(token)

    def chat_prompt(self, messages: list[dict[str, str]]) -> str | None:
        """As in Runner. Raises DataError where the template refuses the messages."""
        if self._tokenizer.chat_template is None:
            return None
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template raises what it likes
            raise DataError(f"the chat template refuses these messages: {error}") from None

    def memory_bytes(self) -> int | None:
        """As in Runner, from MLX's count of live buffers: the folder as loaded, before a CPU widens it."""
        return self._memory
