"""Text to tokens: read, split, train or take a tokenizer, pack, and measure what a unigram model makes of it.

artifact/: tokenizer/ (Hugging Face folder), train.bin/.idx, held_out.bin/.idx, tokens.json
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from hpc.config import Prepare
from hpc.config.stages import Tokenizer as TokenizerConfig
from hpc.data.sources import held_out, read_documents
from hpc.data.store import TokenStore, write_store
from hpc.data.tokenizer import copy_tokenizer, end_of_text_id, load_tokenizer, train_tokenizer
from hpc.errors import DataError
from hpc.run.directory import write_json
from hpc.run.task import Context, Result

ENCODE_BATCH = 256
"""Documents given to the tokenizer at a time."""


def run(context: Context) -> Result:
    """Do the stage. Raises DataError for unreadable or too little text."""
    stage = context.task.stage
    assert isinstance(stage, Prepare)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    artifact = context.directory.artifact
    artifact.mkdir(parents=True)

    context.progress("reading text")
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for source in stage.sources:
        for document in read_documents(source):
            if document.strip():
                parts["held_out" if held_out(document, stage.held_out_fraction) else "train"].append(document)
    for part, documents in parts.items():
        if not documents:
            raise DataError(
                f"{sum(map(len, parts.values()))} documents leave the {part} part empty at held_out_fraction = "
                f"{stage.held_out_fraction}: add documents, or cut long ones into several"
            )

    folder = artifact / "tokenizer"
    context.progress("tokenizer")
    tokenizer = _tokenizer(context, stage, parts["train"], folder)
    end = end_of_text_id(tokenizer, folder)

    vocab_size = tokenizer.get_vocab_size()
    counts = {}
    for part, documents in parts.items():
        context.progress(f"tokenizing {part}")
        counts[part] = write_store(artifact / part, _encode(tokenizer, documents, end), vocab_size)
    unigram = unigram_loss(TokenStore(artifact / "train"), TokenStore(artifact / "held_out"), vocab_size)
    held_out_bytes = sum(len(document.encode()) for document in parts["held_out"])
    write_json(
        artifact / "tokens.json",
        {"vocab_size": vocab_size, "end_of_text_id": end, "tokens_train": counts["train"],
         "tokens_held_out": counts["held_out"], "bytes_held_out": held_out_bytes},
    )  # fmt: skip
    metrics = {
        "documents_train": len(parts["train"]),
        "documents_held_out": len(parts["held_out"]),
        "tokens_train": counts["train"],
        "tokens_held_out": counts["held_out"],
        "bytes_held_out": held_out_bytes,
        "vocab_size": vocab_size,
        "unigram_loss": unigram,
        "unigram_perplexity": float(np.exp(unigram)),
    }
    provenance = {name: "measured: counted over all documents" for name in metrics}
    provenance["unigram_loss"] = "measured: add-one unigram model of the training tokens, on all held-out tokens, nats"
    provenance["unigram_perplexity"] = "derived: exp(unigram_loss)"
    return Result(metrics, provenance, libraries=("tokenizers", "numpy"))


def unigram_loss(train: TokenStore, evaluation: TokenStore, vocab_size: int) -> float:
    """Mean negative log-likelihood (nats per token) of a unigram model with add-one smoothing."""
    counts = np.bincount(train.tokens, minlength=vocab_size) + 1.0
    log_probabilities = np.log(counts / counts.sum())
    return float(-log_probabilities[evaluation.tokens].mean())


def _tokenizer(context: Context, stage: Prepare, documents: list[str], folder: Path) -> Tokenizer:
    earlier = context.inputs("tokens")
    if earlier:
        return copy_tokenizer(earlier[0][1] / "tokenizer", folder)
    wanted = stage.tokenizer or TokenizerConfig()
    if wanted.path:
        return copy_tokenizer(Path(wanted.path), folder)
    train_tokenizer(documents, wanted.vocab_size, folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.get_vocab_size() != wanted.vocab_size:
        raise DataError(
            f"the text yields {tokenizer.get_vocab_size():,} vocabulary entries, tokenizer.vocab_size asks for "
            f"{wanted.vocab_size:,}: lower it, or add text"
        )
    return tokenizer


def _encode(tokenizer: Tokenizer, documents: list[str], end: int) -> Iterator[list[int]]:
    for first in range(0, len(documents), ENCODE_BATCH):
        for encoding in tokenizer.encode_batch(documents[first : first + ENCODE_BATCH], add_special_tokens=False):
            yield [*encoding.ids, end]
