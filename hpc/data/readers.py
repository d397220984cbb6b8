"""Documents out of one piece of one file: text, JSONL, JSONL.zst and Parquet.

A piece is a range of a file that can be read without what comes before it: bytes of a JSONL file (a line belongs to the
piece in which it begins), row groups of a Parquet file, and all of a text or compressed file.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hpc.data.chat import messages_of, to_document
from hpc.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
JSONL_SUFFIX, COMPRESSED_SUFFIX, PARQUET_SUFFIX = ".jsonl", ".jsonl.zst", ".parquet"


@dataclass(frozen=True)
class Piece:
    """Part of a file."""

    path: Path
    begin: int
    end: int
    """Behind the last byte of a text or JSONL file or the last row group of a Parquet file."""
    size_bytes: int


def pieces(path: Path, limit: int) -> list[Piece]:
    """A file in pieces of about `limit` bytes where its format allows it. Raises DataError."""
    size = path.stat().st_size
    if path.name.endswith(JSONL_SUFFIX):
        starts = range(0, size, limit)
        return [Piece(path, start, min(start + limit, size), min(limit, size - start)) for start in starts]
    if path.name.endswith(PARQUET_SUFFIX):
        return list(_row_groups(path, limit))
    return [Piece(path, 0, size, size)]


CHAT = ""
"""In place of a field: the whole record is a conversation."""


def read_piece(piece: Piece, text_key: str) -> Iterator[str]:
    """Documents of a piece, in order; with the key CHAT, conversations as hpc/data/chat.py writes them.

    Raises DataError naming the file, and the line where there is one.
    """
    path = piece.path
    try:
        if path.name.endswith(TEXT_SUFFIXES):
            if text_key == CHAT:
                raise DataError(f"{path}: format = chat is for .jsonl, .jsonl.zst and .parquet files: take those")
            yield path.read_text(encoding="utf-8")
        elif path.name.endswith(JSONL_SUFFIX):
            with path.open("rb") as file:
                yield from _read_lines(file, piece, text_key)
        elif path.name.endswith(COMPRESSED_SUFFIX):
            yield from _read_compressed(piece, text_key)
        elif path.name.endswith(PARQUET_SUFFIX):
            yield from _read_parquet(piece, text_key)
        else:
            raise DataError(
                f"{path}: files of type {path.suffix!r} are not read: "
                "use .txt, .md, .rst, .jsonl, .jsonl.zst or .parquet"
            )
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or leave it out of files"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}): check its permissions and that it is whole"
        ) from None


def _read_lines(file: BinaryIO | io.BufferedReader, piece: Piece, text_key: str) -> Iterator[str]:
    """Records of the lines that begin inside the piece."""
    offset = piece.begin
    if offset:
        file.seek(offset - 1)
        offset += len(file.readline()) - 1  # the rest of a line that begins before
    while offset < piece.end:
        line = file.readline()
        if not line:
            return
        if line.strip():
            yield _record(line, piece.path, offset, text_key)
        offset += len(line)


def _record(line: bytes, path: Path, offset: int, text_key: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
        if text_key == CHAT:
            return _conversation(record, f"{path}:{_line_number(path, offset)}")
        text = record[text_key]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {offset + error.start}): convert it, or leave it out of files"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{path}:{_line_number(path, offset)}: not a JSON object with the field {text_key!r}: "
            "set text_key to the right one"
        ) from None
    if not isinstance(text, str):
        raise DataError(f"{path}:{_line_number(path, offset)}: {text_key!r} holds a {type(text).__name__}, not a text")
    return text


def _conversation(record: Any, place: str) -> str:
    messages = messages_of(record)
    if messages is None:
        raise DataError(
            f"{place}: not a conversation: give messages with role and content, or prompt and completion, as texts"
        )
    return to_document(messages)


def _line_number(path: Path, offset: int) -> int:
    """Number of the line that begins at an offset of the (uncompressed) text; only an error message needs it."""
    number = 1
    with _decompressed(path) if path.name.endswith(COMPRESSED_SUFFIX) else path.open("rb") as file:
        while offset > 0:
            block = file.read(min(offset, 1 << 20))
            number += block.count(b"\n")
            offset -= len(block)
    return number


def _read_compressed(piece: Piece, text_key: str) -> Iterator[str]:
    with _decompressed(piece.path) as file:
        whole = Piece(piece.path, 0, 1 << 62, piece.size_bytes)
        yield from _read_lines(file, whole, text_key)


def _decompressed(path: Path) -> io.BufferedReader:
    """The text of a zstd file; a cut-off one raises OSError on reading. pyarrow brings the decompressor along."""
    import pyarrow

    stream: Any = pyarrow.input_stream(str(path), compression="zstd", buffer_size=1 << 20)
    return io.BufferedReader(stream, 1 << 20)


def _row_groups(path: Path, limit: int) -> Iterator[Piece]:
    """Runs of row groups of about `limit` uncompressed bytes."""
    metadata = _open_parquet(path).metadata
    begin, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= limit or group + 1 == metadata.num_row_groups:
            yield Piece(path, begin, group + 1, size)
            begin, size = group + 1, 0


def _open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None


def _read_parquet(piece: Piece, text_key: str) -> Iterator[str]:
    import pyarrow

    file = _open_parquet(piece.path)
    if text_key == CHAT:
        for batch in file.iter_batches(row_groups=range(piece.begin, piece.end)):
            yield from (_conversation(record, str(piece.path)) for record in batch.to_pylist())
        return
    names = file.schema_arrow.names
    if text_key not in names:
        raise DataError(f"{piece.path} has no column {text_key!r}: its columns are {', '.join(names)}")
    try:
        for batch in file.iter_batches(columns=[text_key], row_groups=range(piece.begin, piece.end)):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise DataError(f"{piece.path}: {text_key!r} holds a {type(text).__name__}, not a text")
                if text:
                    yield text
    except pyarrow.ArrowException as error:
        raise DataError(f"{piece.path} is not a readable Parquet file: {error}") from None
