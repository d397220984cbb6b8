"""What several stages do in the same way."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hpc.config import TrainingBase
from hpc.data.loader import Share
from hpc.data.store import TokenStore
from hpc.data.tokenizer import FILES, tokenizer_hash
from hpc.errors import ConfigError, DataError
from hpc.run.task import Context

BASE_FILE = "base.json"
"""Says which model an adapter belongs to, `merge` refuses another one; and some held-out ids to try a merge on."""


def experts_per_token(config: Any) -> int:
    """Experts that a token of a transformers model uses, 0 for a dense one."""
    return int(getattr(config, "num_experts_per_tok", None) or 0)


def experts_of(config: Any) -> int:
    """Routed experts in a layer of a transformers model, 0 for a dense one."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)


def token_facts(tokens: Path) -> dict[str, Any]:
    """tokens.json of a `prepare` stage: vocab_size, end_of_text_id, tokens and bytes of each part."""
    facts: dict[str, Any] = json.loads((tokens / "tokens.json").read_text(encoding="utf-8"))
    return facts


def mixture(context: Context, settings: TrainingBase) -> tuple[tuple[Share, ...], tuple[TokenStore, ...]]:
    """What a stage trains on, with its weights, and the held-out tokens of the same sources.

    Raises DataError when the sources were made with different tokenizers.
    """
    texts = context.inputs("tokens")
    first_name, first = texts[0]
    for name, folder in texts[1:]:
        if tokenizer_hash(folder / "tokenizer") != tokenizer_hash(first / "tokenizer"):
            raise DataError(
                f"{first_name!r} and {name!r} were tokenized differently and cannot be mixed: let one of these prepare "
                "stages need the other, so that it takes its tokenizer"
            )
    shares = tuple(Share(name, TokenStore(folder / "train"), settings.mixture.get(name, 1.0)) for name, folder in texts)
    return shares, tuple(TokenStore(folder / "held_out") for _, folder in texts)


def check_fit(context: Context, config: Any, settings: TrainingBase) -> None:
    """Whether a model can be trained as asked on the token sets that the stage needs. config: transformers'.

    Raises ConfigError for a layout that its experts do not allow, DataError for ids that it has no embedding for.
    """
    name, experts, group = context.inputs("model")[0][0], experts_of(config), settings.parallel.expert_parallel_size
    if group > 1 and not experts:
        raise ConfigError(
            f"parallel.expert_parallel_size = {group}, but {name!r} is a dense model: set it to 1, or upcycle the model"
        )
    if experts % group:
        raise ConfigError(
            f"parallel.expert_parallel_size = {group} does not divide the {experts} experts of {name!r}: choose a "
            f"divisor of {experts}"
        )
    check_vocabulary(context, name, config)


def check_vocabulary(context: Context, name: str, config: Any) -> None:
    """Raises DataError for a needed text with ids that the model `name` has no embedding for. config: transformers'."""
    for text, folder in context.inputs("tokens"):
        entries = token_facts(folder)["vocab_size"]
        if entries > config.vocab_size:
            raise DataError(
                f"{text!r} was tokenized with {entries:,} entries, {name!r} has embeddings for {config.vocab_size:,}, "
                f"{entries - config.vocab_size:,} fewer: let {text!r} need the stage that makes the model"
            )


@contextmanager
def workspace(context: Context) -> Iterator[tuple[Path, Path]]:
    """`.artifact`, a name for what will become the artifact, and `.scratch`, for what is thrown away; other names that
    begin so may be used too. Nothing is there at first, even after a killed attempt, and nothing stays but what was
    renamed to the artifact, however the stage ends."""
    staging, scratch = (context.directory.artifact.with_name(name) for name in (".artifact", ".scratch"))

    def clear() -> None:
        for place in (path for kind in (staging, scratch) for path in kind.parent.glob(f"{kind.name}*")):
            shutil.rmtree(place) if place.is_dir() else place.unlink()

    clear()
    try:
        yield staging, scratch
    finally:
        clear()


PROBE_LENGTH = 128
"""Ids of each sequence that a shrunken model and its source are compared on."""


def probe_sequences(context: Context, tokens: int, vocab_size: int) -> tuple[list[list[int]], str]:
    """About so many ids to compare two models on, in sequences of PROBE_LENGTH, and what they are: taken evenly from
    all over the held-out part of the texts that the stage needs, else random."""
    count = max(2, tokens // PROBE_LENGTH)
    stores = [TokenStore(folder / "held_out").tokens for _, folder in context.inputs("tokens")]
    rows: list[list[int]] = []
    for store in stores:
        whole = len(store) // PROBE_LENGTH
        share = min(whole, -(-count // len(stores)))
        starts = [PROBE_LENGTH * (number * whole // share) for number in range(share)]
        rows += [store[start : start + PROBE_LENGTH].tolist() for start in starts]
    if len(rows) >= 2:
        return rows, "held-out"
    random = np.random.default_rng(context.task.seed)
    return random.integers(vocab_size, size=(count, PROBE_LENGTH)).tolist(), "random"


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Take a tokenizer along with a model."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
