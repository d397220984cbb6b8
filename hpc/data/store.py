"""Packed tokens on disk, in the .bin/.idx format of Megatron-LM, so that other trainers can read and write it too.

    NAME.bin   all documents' tokens, one after another (uint16 below 65,500 entries of vocabulary, else int32)
    NAME.idx   b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 sequences, uint64 document boundaries,
               int32 length of each sequence, int64 byte offset of each sequence, int64 document boundaries
               (numbers of sequences: 0, then the sequence behind each document), all little-endian

We write one sequence for each document; Megatron may write several. Both files are mapped, not read: a store of any
size opens in microseconds, and the start of a document is found by bisection in the file.
Format: Megatron-LM, megatron/core/datasets/indexed_dataset.py. Written here because the format is all we need of it.
"""

import mmap
import shutil
import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hpc.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
NUMBER = struct.Struct("<q")
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}.items()
}
"""Megatron's codes of the whole numbers; we write 8 and 4, and 1 for answers."""

Tokens = Sequence[int] | NDArray[Any]
"""Ids of one document, (N,)."""


class TokenStore:
    """A read-only token stream in memory-mapped files.

    tokens: all documents in one array, shape (num_tokens,); lengths: tokens of each sequence, shape (sequences,).
    """

    def __init__(self, prefix: Path) -> None:
        """Open PREFIX.bin and PREFIX.idx. Raises DataError when they are not of this format or do not fit together."""
        self._prefix = prefix
        index, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
        self._index = _map(index)
        if len(self._index) < HEADER.size or self._index[: len(MAGIC)] != MAGIC:
            raise DataError(f"{index} is not a Megatron index file")
        _, version, self.code, self._sequences, boundaries = HEADER.unpack_from(self._index)
        self._pointers = HEADER.size + 4 * self._sequences
        first_boundary = self._pointers + 8 * self._sequences
        if version != 1 or self.code not in DTYPES or len(self._index) < first_boundary + 8 * boundaries:
            raise DataError(
                f"{index} is cut off, or has version {version} and dtype {self.code}: read are version 1 and dtypes "
                f"{', '.join(map(str, DTYPES))}"
            )
        self.num_documents = max(0, boundaries - 1)
        dtype = DTYPES[self.code]
        self._bytes_per_token = dtype.itemsize
        self.lengths: NDArray[np.int32] = np.frombuffer(self._index, "<i4", self._sequences, offset=HEADER.size)
        expected = 0
        if self._sequences:
            (last,) = NUMBER.unpack_from(self._index, first_boundary - 8)
            expected = last + int(self.lengths[-1]) * dtype.itemsize
        if not data.exists() or data.stat().st_size != expected:
            raise DataError(f"{data} does not have the {expected:,} bytes that its index states")
        self.tokens: NDArray[Any] = np.frombuffer(_map(data), dtype) if expected else np.empty(0, dtype)
        self._num_bytes = expected
        self._start_of = self._document_starts(first_boundary)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def answers(self) -> NDArray[Any] | None:
        """1 for tokens that are answers in a conversation, else 0, (num_tokens,); None where all tokens count."""
        prefix = answers_of(self._prefix)
        if not prefix.with_suffix(".idx").exists():
            return None
        found = TokenStore(prefix).tokens
        if len(found) != len(self):
            raise DataError(f"{prefix} marks {len(found):,} tokens of {len(self):,}: prepare the text again")
        return found

    def document_starts(self, begin: int, end: int) -> list[int]:
        """Positions in `tokens`, from `begin` to below `end`, at which a document starts; in order."""
        start_of = self._start_of
        first = bisect_left(range(self.num_documents), begin * self._bytes_per_token, key=start_of)
        starts = []
        for number in range(first, self.num_documents):
            start = start_of(number) // self._bytes_per_token
            if start >= end:
                break
            starts.append(start)
        return starts

    def _document_starts(self, boundaries: int) -> Callable[[int], int]:
        """Number of a document -> byte offset of its first token; short, because a bisection calls it often."""
        index, pointers, read, end = self._index, self._pointers, NUMBER.unpack_from, self._num_bytes
        if self.num_documents == self._sequences:
            return lambda number: read(index, pointers + 8 * number)[0]

        def start_of(number: int) -> int:
            sequence = read(index, boundaries + 8 * number)[0]
            return read(index, pointers + 8 * sequence)[0] if sequence < self._sequences else end

        return start_of


def answers_of(prefix: Path) -> Path:
    """Where the answers of a store are kept: a store of 0 and 1 beside it."""
    return prefix.with_name(f"{prefix.name}_answers")


def _map(path: Path) -> mmap.mmap | bytes:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # an empty file cannot be mapped
        return b""
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


class StoreWriter:
    """Writes a store document by document; the index is written when the block ends without an error."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.code = 1 if vocab_size <= 2 else 8 if vocab_size < 65500 else 4
        self.lengths = array("i")
        self.num_tokens = 0
        self._prefix = prefix
        self._file = prefix.with_suffix(".bin").open("wb")

    def add(self, ids: Tokens) -> None:
        """Append one document."""
        self._file.write(np.asarray(ids, DTYPES[self.code]).tobytes())
        self.lengths.append(len(ids))
        self.num_tokens += len(ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            write_index(self._prefix, self.code, np.frombuffer(self.lengths, np.int32))


def write_store(prefix: Path, documents: Iterable[Tokens], vocab_size: int) -> int:
    """Write documents (token ids) as PREFIX.bin and PREFIX.idx; returns the number of tokens."""
    with StoreWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return writer.num_tokens


def write_index(prefix: Path, code: int, lengths: NDArray[np.int32]) -> None:
    """Write PREFIX.idx for documents of these lengths, shape (documents,), that lie in PREFIX.bin."""
    offsets = np.zeros(len(lengths), "<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    offsets *= DTYPES[code].itemsize
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(offsets.tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def join_stores(prefix: Path, parts: Sequence[Path]) -> None:
    """Write the documents of stores of ours, one store after another, as PREFIX.bin and PREFIX.idx."""
    lengths, code = [], 0
    with prefix.with_suffix(".bin").open("wb") as file:
        for part in parts:
            with part.with_suffix(".bin").open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 22)
            store = TokenStore(part)
            code = store.code
            lengths.append(store.lengths.copy())  # not a view: each would hold two files open
    write_index(prefix, code, np.concatenate(lengths))
