"""What a stage's sources consist of: files, files that a package ships, a module's texts; cut into chunks of work.

Chunks depend on the files alone, never on the number of workers, so that a result does not either. Their order is the
order of documents: sources as they are listed, files by name.
"""

import glob
import hashlib
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.config import Source
from hpc.data.readers import CHAT, Piece, pieces, read_piece
from hpc.errors import DataError

CHUNK_BYTES = 4 << 20
"""Least size of a chunk, about two seconds of one core."""
MOST_CHUNKS = 4096
"""Larger chunks where there would be more than about this many."""


@dataclass(frozen=True)
class Chunk:
    """Documents that one worker reads in one go."""

    source: Source
    pieces: tuple[Piece, ...]
    """Empty for a module."""
    size_bytes: int
    """Of the text as it lies on disk, to measure progress by."""
    identity: tuple[Any, ...]
    """Changes when a file does: path, range, size and time of modification of each piece."""


def chunks(sources: Sequence[Source]) -> list[Chunk]:
    """All sources in chunks. Raises DataError when a file is not there."""
    files = [[] if source.module else find_files(source) for source in sources]
    total = sum(path.stat().st_size for paths in files for path in paths)
    limit = max(CHUNK_BYTES, total // MOST_CHUNKS)
    found: list[Chunk] = []
    for source, paths in zip(sources, files, strict=True):
        if source.module:
            found.append(_module_chunk(source))
        waiting: list[Piece] = []
        size = 0
        for piece in (piece for path in paths for piece in pieces(path, limit)):
            if waiting and size + piece.size_bytes > limit:
                found.append(_chunk(source, waiting))
                waiting, size = [], 0
            waiting.append(piece)
            size += piece.size_bytes
        if waiting:
            found.append(_chunk(source, waiting))
    return found


def read_chunk(chunk: Chunk) -> Iterator[str]:
    """Documents of a chunk in order, without blank ones. Raises DataError naming the file that cannot be read."""
    if chunk.source.module:
        texts = _module_texts(chunk.source.module)
    else:
        key = CHAT if chunk.source.format == "chat" else chunk.source.text_key
        texts = (text for piece in chunk.pieces for text in read_piece(piece, key))
    return (text for text in texts if text.strip())


def training_texts(found: Sequence[Chunk], held_out_fraction: float, max_bytes: int) -> Iterator[str]:
    """Training documents to learn a vocabulary from: about `max_bytes`, the first ones of every chunk alike."""
    total = sum(chunk.size_bytes for chunk in found)
    for chunk in found:
        left = float("inf") if total <= max_bytes else max_bytes * chunk.size_bytes / total
        for text in read_chunk(chunk):
            if left <= 0:
                break
            if not held_out(text, held_out_fraction):
                left -= len(text.encode(errors="replace"))
                yield text


def find_files(source: Source) -> list[Path]:
    """The files that a source names, sorted. Raises DataError when a pattern finds none."""
    folder = _package_folder(source.package) if source.package else None
    found: set[Path] = set()
    for pattern in source.files:
        full = str(folder / pattern) if folder else pattern
        paths = [Path(name) for name in glob.glob(full, recursive=True) if Path(name).is_file()]
        if not paths:
            raise DataError(f"sources.files: {full!r} matches no file: check the path or the pattern")
        found.update(paths)
    return sorted(found)


def held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part: decided by a hash of its text, so it never changes sides."""
    number = int.from_bytes(hashlib.sha256(document.encode("utf-8", errors="replace")).digest()[:8], "big")
    return number < fraction * 2**64


def _chunk(source: Source, parts: list[Piece]) -> Chunk:
    states = [(part, part.path.stat()) for part in parts]
    identity = tuple((str(part.path), part.begin, part.end, state.st_size, state.st_mtime_ns) for part, state in states)
    return Chunk(source, tuple(parts), sum(part.size_bytes for part in parts), identity)


def _module_chunk(source: Source) -> Chunk:
    """A module's texts are one chunk: it is imported as a whole anyway."""
    assert source.module is not None
    try:
        spec = importlib.util.find_spec(source.module.split(":", 1)[0])
    except ImportError:
        spec = None  # reading it says what is wrong
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return Chunk(source, (), 0, (source.module,))
    state = Path(spec.origin).stat()
    return Chunk(source, (), state.st_size, (source.module, spec.origin, state.st_size, state.st_mtime_ns))


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"sources.package: {package!r} is not installed: pip install {package}, or name other files")
    return Path(spec.submodule_search_locations[0])


def _module_texts(where: str) -> Iterator[str]:
    module, attribute = where.split(":", 1)
    try:
        texts = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"sources.module: {where!r} cannot be read ({error}): check the module and its attribute"
        ) from None
    values = texts.values() if isinstance(texts, dict) else texts
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"sources.module: {where!r} holds a {type(value).__name__} where a text is expected")
        yield value
