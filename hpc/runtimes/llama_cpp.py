"""A .gguf file run by llama.cpp: on the CPU, or on Metal or CUDA where the installed build has them.

A file that is damaged in a way that llama.cpp checks by an assertion ends the process: what has to survive that runs
it in a process of its own.

Shape letters: S ids of one sequence, V vocabulary.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpc.errors import ArtifactError, ConfigError
from hpc.runtimes.llama_library import Batch, library
from hpc.runtimes.runner import Sampling
from hpc.runtimes.sampling import choose
from hpc.runtimes.templates import render_prompt

PROMPT_BATCH = 512
"""Ids that go through the model at once."""
LOGITS_BATCH = 128
"""The same where the logits of all are wanted: llama.cpp keeps (LOGITS_BATCH, V) floats."""


class LlamaCpp:
    """A loaded .gguf file; implements `Runner`."""

    def __init__(self, path: Path, context_length: int, threads: int) -> None:
        """context_length: ids that prompt and answer may have together. Raises ArtifactError when llama.cpp refuses the
        file, ConfigError when the library is missing."""
        self._library = library()
        self._lib = self._library.functions
        self._context = None
        self._path = path
        self._library.last_error = ""
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise ArtifactError(f"llama.cpp does not load {path} ({self._reason()}): export it again")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._lib.llama_vocab_n_tokens(self._vocab)
        params = self._lib.llama_context_default_params()
        params.n_ctx = context_length
        params.n_batch = params.n_ubatch = min(PROMPT_BATCH, context_length)
        params.n_outputs_max = params.n_outputs_max_per_seq = min(LOGITS_BATCH, context_length)
        params.n_threads = params.n_threads_batch = threads
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise ArtifactError(
                f"llama.cpp has no room for {context_length} ids of context of {path} ({self._reason()}): ask for less"
            )
        self._length = context_length
        self._memory = self._lib.llama_get_memory(self._context)
        self._cached: list[int] = []

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._lib.llama_free(self._context)
        if getattr(self, "_model", None):
            self._lib.llama_model_free(self._model)

    def _reason(self) -> str:
        return self._library.last_error or "it gives no reason"

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text, as in `Runner`."""
        data = text.encode("utf-8")
        room = len(data) + 16
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, False, special)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def decode(self, ids: list[int]) -> str:
        """The text of ids, as in `Runner`."""
        return b"".join(self._piece(token) for token in ids).decode("utf-8", "replace")

    def _piece(self, token: int, special: bool = False) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        count = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:count]

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits (S, V), as in `Runner`. Raises ConfigError for more ids than the context holds."""
        self._fit(len(ids))
        self._keep(0)
        rows = []
        for start in range(0, len(ids), LOGITS_BATCH):
            part = ids[start : start + LOGITS_BATCH]
            self._decode(part, all_logits=True)
            pointer = self._lib.llama_get_logits(self._context)
            rows.append(np.ctypeslib.as_array(pointer, (len(part), self.vocab_size)).copy())
        return np.concatenate(rows)

    def stream(self, ids: list[int], max_tokens: int, sampling: Sampling) -> Iterator[int]:
        """New ids after a prompt, as in `Runner`; also ends where the context is full.

        What the prompt shares with the ids seen before stays in the cache: a conversation reads only its last turn.
        Raises ConfigError for a prompt that the context does not hold.
        """
        self._fit(len(ids) + 1)
        shared = 0
        while shared < min(len(self._cached), len(ids) - 1) and self._cached[shared] == ids[shared]:
            shared += 1
        self._keep(shared)
        for start in range(shared, len(ids), PROMPT_BATCH):
            self._decode(ids[start : start + PROMPT_BATCH])
        random = np.random.default_rng(sampling.seed)
        for _ in range(max_tokens):
            row = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), (self.vocab_size,))
            token = choose(row, sampling, random)
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                return
            yield token
            if len(self._cached) == self._length:
                return
            self._decode([token])

    def _fit(self, count: int) -> None:
        if count > self._length:
            raise ConfigError(f"{count} ids do not fit the context of {self._length}: shorten the text or raise it")

    def _keep(self, count: int) -> None:
        """Forget all of the cache but its first `count` ids; where a model cannot, everything."""
        if not (count and self._lib.llama_memory_seq_rm(self._memory, 0, count, -1)):
            self._lib.llama_memory_clear(self._memory, True)
            count = 0
        del self._cached[count:]

    def _decode(self, ids: list[int], all_logits: bool = False) -> None:
        """Put ids after those in the cache."""
        first, count = len(self._cached), len(ids)
        batch = Batch(
            n_tokens=count,
            token=(ctypes.c_int32 * count)(*ids),
            pos=(ctypes.c_int32 * count)(*range(first, first + count)),
            logits=(ctypes.c_int8 * count)(*[all_logits or n == count - 1 for n in range(count)]),
        )  # no sequence ids: all belong to sequence 0
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise ArtifactError(f"llama.cpp fails to run {self._path} (status {status}, {self._reason()})")
        self._cached += ids

    def chat_prompt(self, messages: list[dict[str, str]]) -> str | None:
        """Messages by the file's own template, as in `Runner`. Raises ArtifactError when the template refuses them."""
        template = self._lib.llama_model_chat_template(self._model, None)
        if template is None:
            return None
        bos, eos = (
            self._piece(token, special=True).decode() if token >= 0 else None
            for token in (self._lib.llama_vocab_bos(self._vocab), self._lib.llama_vocab_eos(self._vocab))
        )
        return render_prompt(template.decode("utf-8"), messages, bos, eos)

    def memory_bytes(self) -> int:
        """Bytes of all tensors, as llama.cpp counts them."""
        return int(self._lib.llama_model_size(self._model))
