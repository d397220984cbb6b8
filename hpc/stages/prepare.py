"""Text to tokens: read, split, train or take a tokenizer, pack, and measure what a unigram model makes of it.

The text is cut into chunks that several processes turn into shards; a killed attempt leaves its shards to the next one,
and nothing is held in memory but the texts at hand (hpc/data/shards.py).

artifact/: tokenizer/ (Hugging Face folder), train.bin/.idx, held_out.bin/.idx, tokens.json
shards/:   tokenizer-KEY/ (one that was trained here), packed/ (shards), until the receipt is written
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from hpc.config import Prepare
from hpc.config.stages import Tokenizer as TokenizerConfig
from hpc.data.chat import PLAIN, TEMPLATE
from hpc.data.shards import PARTS, Counts, Packed, Packing, default_workers, pack
from hpc.data.sources import Chunk, chunks, training_texts
from hpc.data.store import TokenStore
from hpc.data.tokenizer import copy_tokenizer, end_of_text_id, load_tokenizer, train_tokenizer
from hpc.errors import DataError
from hpc.run.directory import write_json
from hpc.run.receipt import digest
from hpc.run.task import Context, Result

TELL_EVERY_S = 1.0
COUNT_BLOCK = 1 << 24
"""Tokens that are counted at a time."""


def run(context: Context) -> Result:
    """Do the stage. Raises DataError for unreadable or too little text."""
    stage = context.task.stage
    assert isinstance(stage, Prepare)
    workers = stage.workers or default_workers()
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(workers))
    artifact, shards = context.directory.artifact, context.directory.shards
    artifact.mkdir(parents=True)
    shards.mkdir(exist_ok=True)

    found = chunks(stage.sources)
    folder = artifact / "tokenizer"
    tokenizer = _tokenizer(context, stage, found, folder)
    has_chat = any(source.format == "chat" for source in stage.sources)
    if has_chat and not (folder / TEMPLATE).exists():
        (folder / TEMPLATE).write_text(PLAIN, encoding="utf-8")
    packing = Packing(shards / "packed", folder, stage.held_out_fraction, has_chat)
    packed = pack(packing, found, workers, _Meter(context, _size(found)).told)
    counts = {part: packed.counts(part) for part in PARTS}
    for part in PARTS:
        if not counts[part].documents:
            raise DataError(
                f"{sum(count.documents for count in counts.values())} documents leave the {part} part empty at "
                f"held_out_fraction = {stage.held_out_fraction}: add documents, or cut long ones into several"
            )
        context.progress(f"joining {part}")
        packed.join(part, artifact / part)
    train, kept = counts["train"], counts["held_out"]
    vocab_size = tokenizer.get_vocab_size()
    context.progress("unigram model")
    unigram = unigram_loss(TokenStore(artifact / "train"), TokenStore(artifact / "held_out"), vocab_size)
    write_json(
        artifact / "tokens.json",
        {"vocab_size": vocab_size, "end_of_text_id": end_of_text_id(tokenizer, folder), "tokens_train": train.tokens,
         "tokens_held_out": kept.tokens, "bytes_held_out": kept.bytes},
    )  # fmt: skip
    return _result(packed, counts, vocab_size, unigram)


def unigram_loss(train: TokenStore, evaluation: TokenStore, vocab_size: int) -> float:
    """Mean negative log-likelihood (nats per token) of a unigram model with add-one smoothing."""
    seen, asked = _count(train, vocab_size) + 1.0, _count(evaluation, vocab_size)
    return float(-(asked * np.log(seen / seen.sum())).sum() / asked.sum())


def _count(store: TokenStore, vocab_size: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """How often each id occurs, (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, len(store), COUNT_BLOCK):
        counts += np.bincount(store.tokens[first : first + COUNT_BLOCK], minlength=vocab_size)
    return counts


def _tokenizer(context: Context, stage: Prepare, found: list[Chunk], folder: Path) -> Tokenizer:
    """The stage's tokenizer, in `folder`. One that an earlier attempt has trained on the same text is taken over."""
    for _, earlier in context.inputs("tokens", "model"):
        own = earlier / "tokenizer"
        return copy_tokenizer(own if own.is_dir() else earlier, folder)
    wanted = stage.tokenizer or TokenizerConfig()
    if wanted.path:
        return copy_tokenizer(Path(wanted.path), folder)
    facts = [wanted.model_dump(mode="json"), stage.held_out_fraction, [chunk.identity for chunk in found]]
    place = context.directory.shards / f"tokenizer-{digest(facts)[:16]}"
    if not place.exists():
        staging = place.with_name(f".{place.name}")
        shutil.rmtree(staging, ignore_errors=True)
        texts = training_texts(found, stage.held_out_fraction, wanted.train_bytes)
        train_tokenizer(_told(context, texts, min(wanted.train_bytes, _size(found))), wanted.vocab_size, staging)
        staging.rename(place)
    tokenizer = load_tokenizer(place)
    if tokenizer.get_vocab_size() != wanted.vocab_size:
        raise DataError(
            f"the text yields {tokenizer.get_vocab_size():,} vocabulary entries, tokenizer.vocab_size asks for "
            f"{wanted.vocab_size:,}: lower it, or add text"
        )
    return copy_tokenizer(place, folder)


def _size(found: list[Chunk]) -> int:
    return sum(chunk.size_bytes for chunk in found)


def _told(context: Context, texts: Iterator[str], total: int) -> Iterator[str]:
    """The texts, with word of how far they have been read."""
    done, last = 0, 0.0
    for text in texts:
        if time.monotonic() - last > TELL_EVERY_S:
            context.progress("reading text for the tokenizer", done=min(done, total), total=total)
            last = time.monotonic()
        done += len(text)
        yield text
    context.progress("training the tokenizer")


class _Meter:
    """Tells how many bytes of text are tokenized, and how many a second in this attempt."""

    def __init__(self, context: Context, total: int) -> None:
        self.context, self.total = context, total
        self.began = time.monotonic()

    def told(self, done: int, before: int) -> None:
        """Take the bytes done, `before` of them by an earlier attempt."""
        self.context.check_budget()
        speed = (done - before) / max(1e-3, time.monotonic() - self.began)
        left = (self.total - done) / speed if speed else None
        self.context.progress(
            "tokenizing", done=done, total=self.total, mb_per_s=round(speed / 1e6, 3), seconds_left=left
        )


def _result(packed: Packed, counts: dict[str, Counts], vocab_size: int, unigram: float) -> Result:
    metrics: dict[str, float] = {}
    for part, count in counts.items():
        metrics |= {f"documents_{part}": count.documents, f"tokens_{part}": count.tokens, f"bytes_{part}": count.bytes}
    metrics |= {"vocab_size": vocab_size, "unigram_loss": unigram, "unigram_perplexity": float(np.exp(unigram))}
    metrics |= {"chunks": len(packed.folders), "chunks_reused": packed.reused}
    provenance = {name: "measured: counted over all documents" for name in metrics}
    provenance["unigram_loss"] = "measured: add-one unigram model of the training tokens, on all held-out tokens, nats"
    provenance["unigram_perplexity"] = "derived: exp(unigram_loss)"
    provenance["chunks"] = "derived: from the sizes of the files"
    provenance["chunks_reused"] = "measured: chunks that an earlier attempt had tokenized"
    return Result(metrics, provenance, libraries=("tokenizers", "numpy"))
