"""Packed tokens on disk, in the .bin/.idx format of Megatron-LM, so that other trainers can read and write it too.

    NAME.bin   all documents' tokens, one after another (uint16 below 65,500 entries of vocabulary, else int32)
    NAME.idx   b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 sequences, uint64 document boundaries,
               int32 length of each sequence, int64 byte offset of each sequence, int64 document boundaries

Format: Megatron-LM, megatron/core/datasets/indexed_dataset.py. Written here because the format is all we need of it.
"""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}


class TokenStore:
    """A read-only token stream in memory-mapped files.

    tokens: all documents in one array, shape (num_tokens,); lengths: tokens of each document, shape (num_documents,).
    """

    def __init__(self, prefix: Path) -> None:
        """Open PREFIX.bin and PREFIX.idx. Raises DataError when they are not of this format or do not fit together."""
        index, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
        try:
            header = index.read_bytes()
        except OSError as error:
            raise DataError(f"{index} cannot be read: {error.strerror}") from None
        if header[: len(MAGIC)] != MAGIC or len(header) < 34:
            raise DataError(f"{index} is not a Megatron index file")
        version, code, sequences, _ = struct.unpack_from("<QBQQ", header, len(MAGIC))
        if version != 1 or code not in DTYPES or len(header) < 34 + 12 * sequences:
            raise DataError(
                f"{index} is cut off, or has version {version} and dtype {code} where 1 and 4 or 8 are read"
            )
        self.lengths: NDArray[np.int32] = np.frombuffer(header, np.int32, sequences, offset=34)
        dtype = DTYPES[code]
        expected = int(self.lengths.astype(np.int64).sum()) * dtype.itemsize
        if not data.exists() or data.stat().st_size != expected:
            raise DataError(f"{data} does not have the {expected:,} bytes that its index states")
        self.tokens: NDArray[Any] = np.memmap(data, dtype, "r") if expected else np.empty(0, dtype)

    def __len__(self) -> int:
        return len(self.tokens)


def write_store(prefix: Path, documents: Iterable[list[int]], vocab_size: int) -> int:
    """Write documents (lists of token ids) as PREFIX.bin and PREFIX.idx; returns the number of tokens."""
    code = 8 if vocab_size < 65500 else 4
    dtype = DTYPES[code]
    lengths: list[int] = []
    with prefix.with_suffix(".bin").open("wb") as file:
        for document in documents:
            array = np.asarray(document, dtype)
            file.write(array.tobytes())
            lengths.append(len(array))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]]) if lengths else np.empty(0, np.int64)
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1))
        file.write(np.asarray(lengths, np.int32).tobytes())
        file.write((offsets * dtype.itemsize).astype(np.int64).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
    return sum(lengths)
