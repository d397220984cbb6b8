"""Documents from text, JSONL and Parquet files, from files that a package ships, and from a module's texts."""

import glob
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from hpc.config import Source
from hpc.errors import DataError

TEXT_SUFFIXES = {".txt", ".md", ".rst"}


def read_documents(source: Source) -> Iterator[str]:
    """Documents of a source in a fixed order. Raises DataError naming the file that cannot be read."""
    if source.module:
        yield from _module_texts(source.module)
        return
    for path in find_files(source):
        yield from _read_file(path, source.text_key)


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


def _read_file(path: Path, text_key: str) -> Iterator[str]:
    try:
        if path.suffix in TEXT_SUFFIXES:
            yield path.read_text(encoding="utf-8")
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(path, text_key)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, text_key)
        else:
            raise DataError(
                f"{path}: files of type {path.suffix!r} are not read: use .txt, .md, .rst, .jsonl or .parquet"
            )
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or leave it out of files"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from None


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_key]
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{path}:{number}: not a JSON object with the field {text_key!r}: set text_key to the right one"
                ) from None
            if not isinstance(text, str):
                raise DataError(f"{path}:{number}: {text_key!r} holds a {type(text).__name__}, not a text")
            yield text


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches(columns=[text_key]):
            if not batch.schema.names:
                raise DataError(
                    f"{path} has no column {text_key!r}: its columns are {', '.join(file.schema_arrow.names)}"
                )
            yield from (text for text in batch.column(0).to_pylist() if text)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None
