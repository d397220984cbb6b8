"""Chunks of text to shards of tokens, on several processes, in a way that survives being killed.

    SHARDS/00017-KEY/train.bin .idx  held_out.bin .idx    tokens of one chunk, a store for each side of the split
    SHARDS/00017-KEY/shard.json                           documents, tokens and bytes of each side; hash of each file

KEY is a hash over everything that the content depends on: the chunk's files with their sizes and times, the tokenizer,
the split. A shard appears whole, by one rename; one that is there under the right key and has the right hashes is not
made again. Shards joined in the order of chunks are what one process would have written, byte for byte.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import Tokenizer

from hpc.data.chat import PLAIN, TEMPLATE, answer_mask, render
from hpc.data.sources import Chunk, held_out, read_chunk
from hpc.data.store import StoreWriter, answers_of, join_stores
from hpc.data.tokenizer import end_of_text_id, load_tokenizer, tokenizer_hash
from hpc.errors import DataError, StageError

PARTS = ("train", "held_out")
ENCODE_BYTES = 1 << 18
"""Text given to the tokenizer at a time; a request to stop waits for so much."""
LAYOUT = 1
"""Part of every key; raise it when the content of shards changes."""


@dataclass(frozen=True)
class Counts:
    """One side of the split."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """Of the text in UTF-8."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.documents + other.documents, self.tokens + other.tokens, self.bytes + other.bytes)


@dataclass(frozen=True)
class Packing:
    """How chunks become shards; what a worker process is told."""

    folder: Path
    """Where shards are kept until they are joined."""
    tokenizer: Path
    held_out_fraction: float
    answers: bool = False
    """Whether to keep which tokens are answers: where any source holds conversations."""

    def places(self, chunks: Sequence[Chunk]) -> list[Path]:
        """Folder of each chunk's shard."""
        shared = [LAYOUT, tokenizer_hash(self.tokenizer), _loaded(self.tokenizer)[1], self.held_out_fraction]
        shared += [_template_hash(self.tokenizer)] if self.answers else []
        places = []
        for number, chunk in enumerate(chunks):
            facts = [*shared, chunk.identity, chunk.source.model_dump(mode="json")]
            key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
            places.append(self.folder / f"{number:05d}-{key}")
        return places


@dataclass(frozen=True)
class Packed:
    """All shards."""

    folders: list[Path]
    reused: int
    """Shards that an earlier attempt had left."""
    answers: bool = False

    def counts(self, part: str) -> Counts:
        """Documents, tokens and bytes of one side of the split."""
        found = [Counts(**json.loads((folder / "shard.json").read_text())["parts"][part]) for folder in self.folders]
        return sum(found, Counts())

    def join(self, part: str, prefix: Path) -> None:
        """Write one side of all shards as one store, with its answers where they are kept."""
        join_stores(prefix, [folder / part for folder in self.folders])
        if self.answers:
            join_stores(answers_of(prefix), [answers_of(folder / part) for folder in self.folders])


def pack(packing: Packing, chunks: Sequence[Chunk], workers: int, told: Callable[[int, int], None]) -> Packed:
    """Make every shard that is not there yet; `told` hears of bytes done, and bytes that were done before.

    Raises what reading raises: DataError; StageError when a worker process died.
    """
    packing.folder.mkdir(parents=True, exist_ok=True)
    places = packing.places(chunks)
    for leftover in set(packing.folder.iterdir()) - set(places):
        shutil.rmtree(leftover, ignore_errors=True)
    todo = [(chunk, place) for chunk, place in zip(chunks, places, strict=True) if not _is_whole(place)]
    before = done = sum(chunk.size_bytes for chunk in chunks) - sum(chunk.size_bytes for chunk, _ in todo)
    told(done, before)
    for chunk in _work(packing, todo, min(workers, len(todo))):
        done += chunk.size_bytes
        told(done, before)
    return Packed(places, len(chunks) - len(todo), packing.answers)


def default_workers() -> int:
    """CPUs this process may use, at most OMP_NUM_THREADS where that is more than one (so it is in a job of ours)."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    cpus = len(os.sched_getaffinity(0))
    return min(cpus, threads) if threads > 1 else cpus


def _work(packing: Packing, todo: list[tuple[Chunk, Path]], workers: int) -> Iterator[Chunk]:
    """Chunks as their shards are done."""
    if workers <= 1:
        for chunk, place in todo:
            _make_shard(packing, chunk, place)
            yield chunk
        return
    context = multiprocessing.get_context("spawn")  # threads of this process would not survive a fork
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (stop,))
    try:
        waiting = {pool.submit(_make_shard, packing, chunk, place): chunk for chunk, place in todo}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                future.result()
                yield waiting.pop(future)
    except BrokenProcessPool:
        raise StageError(
            f"one of {workers} processes that read text was killed, by the system if memory ran out: set a smaller "
            "`workers`"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_stop: Any = None
"""In a worker process: set when the others should end as well."""


def _start_worker(stop: Any) -> None:
    """Ctrl-C is the parent's business, and a worker does not outlive it, however the parent ended."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_shard(packing: Packing, chunk: Chunk, place: Path) -> None:
    """Read, split, tokenize and write one chunk."""
    tokenizer, end = _loaded(packing.tokenizer)
    vocab_size = tokenizer.get_vocab_size()
    staging = place.with_name(f".{place.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    parts = dict.fromkeys(PARTS, Counts())
    is_chat = chunk.source.format == "chat"
    with ExitStack() as stack:
        writers = {part: stack.enter_context(StoreWriter(staging / part, vocab_size)) for part in PARTS}
        answers = {
            part: stack.enter_context(StoreWriter(answers_of(staging / part), 2))
            for part in (PARTS if packing.answers else ())
        }
        for batch in _batches(read_chunk(chunk)):
            if _stop is not None and _stop.is_set():
                raise StageError("another worker failed")
            texts = [text for text, _ in batch]
            encoded = _encode_chat(tokenizer, texts, packing.tokenizer) if is_chat else _encode(tokenizer, texts)
            for (text, size), (ids, mask) in zip(batch, encoded, strict=True):
                part = "held_out" if held_out(text, packing.held_out_fraction) else "train"
                writers[part].add([*ids, end])
                if packing.answers:
                    answers[part].add([*(mask or [1] * len(ids)), 1])
                parts[part] += Counts(1, len(ids) + 1, size)
    files = {path.name: _hash(path) for path in sorted(staging.iterdir())}
    content = {"parts": {name: asdict(counts) for name, counts in parts.items()}, "files": files}
    (staging / "shard.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(place, ignore_errors=True)
    staging.rename(place)


def _batches(documents: Iterator[str]) -> Iterator[list[tuple[str, int]]]:
    """Documents with their sizes in bytes, in lists of about ENCODE_BYTES."""
    batch: list[tuple[str, int]] = []
    total = 0
    for text in documents:
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise DataError(
                f"a text that begins with {text[:40].encode(errors='replace').decode()!r} holds half of a surrogate "
                "pair, which is no character: repair it, or leave it out"
            ) from None
        batch.append((text, size))
        total += size
        if total >= ENCODE_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[tuple[list[int], list[int] | None]]:
    return ((encoding.ids, None) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))


def _encode_chat(
    tokenizer: Tokenizer, documents: list[str], folder: Path
) -> Iterator[tuple[list[int], list[int] | None]]:
    """Ids of conversations, and which of them are answers."""
    rendered = [render(document, folder) for document in documents]
    encodings = tokenizer.encode_batch([chat.text for chat in rendered], add_special_tokens=False)
    return ((e.ids, answer_mask(e.offsets, chat.answers)) for e, chat in zip(encodings, rendered, strict=True))


def _template_hash(folder: Path) -> str:
    path = folder / TEMPLATE
    return hashlib.sha256(path.read_bytes() if path.is_file() else PLAIN.encode()).hexdigest()


@lru_cache(maxsize=1)
def _loaded(folder: Path) -> tuple[Tokenizer, int]:
    tokenizer = load_tokenizer(folder)
    return tokenizer, end_of_text_id(tokenizer, folder)


def _is_whole(folder: Path) -> bool:
    """Whether a shard is there and its files are what was written."""
    try:
        files = json.loads((folder / "shard.json").read_text(encoding="utf-8"))["files"]
        return bool(files) and all(_hash(folder / name) == value for name, value in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
