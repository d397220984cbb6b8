"""The door to transformers as a runtime: full-precision folders and compressed-tensors ones, which it unpacks."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hpc.data.chat import TEMPLATE
from hpc.data.tokenizer import load_tokenizer
from hpc.model.build import load_model
from hpc.runtimes.runner import Sampling
from hpc.runtimes.sampling import choose
from hpc.runtimes.templates import render_prompt


class Transformers:
    """A transformers folder in fp32, on a GPU where there is one: what others are compared with is not rounded."""

    def __init__(self, folder: Path) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(folder, torch.float32).eval().to(self._device)
        self._tokenizer = load_tokenizer(folder)
        self._plain = load_tokenizer(folder)
        self._plain.encode_special_tokens = True
        self._template = folder / TEMPLATE
        self._named_tokens = [_named_token(folder, name) for name in ("bos_token", "eos_token")]
        self._ends = _ends(folder, self.model.config.eos_token_id)
        self.vocab_size = int(self.model.config.vocab_size)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """As in Runner."""
        tokenizer = self._tokenizer if special else self._plain
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """As in Runner."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def batch_logits(self, ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Logits (B, S, V) of ids (B, S); positions (B, S) begin again where another document does."""
        places = None if positions is None else positions.to(self._device)
        with torch.no_grad():
            found: torch.Tensor = self.model(
                input_ids=ids.to(self._device), position_ids=places, use_cache=False
            ).logits
        return found.cpu()

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """As in Runner."""
        with torch.no_grad():
            found = self.model(input_ids=torch.tensor([ids], device=self._device), use_cache=False).logits[0]
        array: npt.NDArray[np.float32] = found.float().cpu().numpy()
        return array

    def stream(self, ids: list[int], max_tokens: int, sampling: Sampling) -> Iterator[int]:
        """As in Runner."""
        random = np.random.default_rng(sampling.seed)
        new, cache = torch.tensor([ids], device=self._device), None
        for _ in range(max_tokens):
            with torch.no_grad():
                output = self.model(input_ids=new, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            token = choose(output.logits[0, -1].float().cpu().numpy(), sampling, random)
            if token in self._ends:
                return
            yield token
            new = torch.tensor([[token]], device=self._device)

    def chat_prompt(self, messages: list[dict[str, str]]) -> str | None:
        """As in Runner."""
        if not self._template.is_file():
            return None
        return render_prompt(self._template.read_text(encoding="utf-8"), messages, *self._named_tokens)

    def memory_bytes(self) -> int | None:
        """As in Runner: parameters and buffers."""
        tensors: list[torch.Tensor] = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _named_token(folder: Path, name: str) -> str | None:
    """A token that a chat template may name, from tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    token = json.loads(path.read_text(encoding="utf-8")).get(name) if path.is_file() else None
    return token.get("content") if isinstance(token, dict) else token


def _ends(folder: Path, config_end: int | list[int] | None) -> set[int]:
    """Ids that end an answer, from generation_config.json or the configuration."""
    path = folder / "generation_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    end = content.get("eos_token_id", config_end)
    return set() if end is None else {end} if isinstance(end, int) else set(end)
