"""The header of a .gguf file: its model's shape, and the bytes of every tensor.

Format: github.com/ggml-org/ggml docs/gguf.md, version 2 and 3, little endian. Read here because the gguf package loads
NumPy, and a login node only wants to know how large something is. Nothing but the header is read; the bytes of a tensor
are the distance to the next one.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hpc.errors import DataError
from hpc.plan.inference.formats import Size
from hpc.plan.shapes import Shape

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
FTYPES = {
    1: "bf16", 2: "gguf-q4_0", 7: "gguf-q8_0", 10: "gguf-q2_k", 12: "gguf-q3_k_m", 15: "gguf-q4_k_m", 17: "gguf-q5_k_m",
    18: "gguf-q6_k", 30: "gguf-iq4_xs", 32: "bf16",
}  # fmt: skip
"""llama.cpp's general.file_type -> format."""
ALTERNATING = ("gpt-oss", "gemma2")
"""Architectures of which every second layer has a window; of others the whole cache is counted."""
MOST = 2**24
"""More metadata or tensors than this is no model but a damaged header."""


@dataclass(frozen=True)
class GGUF:
    """What a file says of itself."""

    name: str
    shape: Shape
    context: int | None
    size: Size
    format: str | None
    """The mix, where the file says which."""


def read(path: Path) -> GGUF:
    """The header of a file and of the parts it is split into. Raises DataError."""
    metadata: dict[str, Any] = {}
    found: list[tuple[str, int, int]] = []
    for part in _parts(path):
        try:
            with part.open("rb") as file:
                fields, sizes = _header(file, part.stat().st_size)
        except (OSError, ValueError, struct.error, KeyError, MemoryError) as error:
            raise DataError(f"{part} is not a readable GGUF file ({error}): fetch it again") from None
        metadata, found = {**fields, **metadata}, [*found, *sizes]
    try:
        return _told(path, metadata, found)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"{path} does not describe a language model (metadata {error}): fetch it again") from None


def _parts(path: Path) -> list[Path]:
    """A file, or all of its kind when it is one of several: NAME-00001-of-00003.gguf."""
    split = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if not split:
        return [path]
    return [path.with_name(f"{split[1]}-{n:05}-of-{split[2]}.gguf") for n in range(1, int(split[2]) + 1)]


def _header(file: BinaryIO, file_bytes: int) -> tuple[dict[str, Any], list[tuple[str, int, int]]]:
    """Metadata; name, parameters and bytes of every tensor."""
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = _number(file, "I")
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    num_tensors, num_fields = _number(file, "Q"), _number(file, "Q")
    if max(num_tensors, num_fields) > MOST:
        raise ValueError("the counts in its header cannot be")
    metadata = {_string(file): _value(file, _number(file, "I")) for _ in range(num_fields)}
    infos = []
    for _ in range(num_tensors):
        name, dims, parameters = _string(file), _number(file, "I"), 1
        for _ in range(dims):
            parameters *= _number(file, "Q")
        _number(file, "I")
        infos.append((_number(file, "Q"), name, parameters))
    step = int(metadata.get("general.alignment", 32))
    data = file_bytes - -(-file.tell() // step) * step
    infos.sort()
    ends = [*(offset for offset, _, _ in infos[1:]), data]
    found = [(name, n, end - start) for (start, name, n), end in zip(infos, ends, strict=True)]
    if any(8 * held < n for _, n, held in found):  # less than a bit a weight
        raise ValueError("it ends before its tensors do")
    return metadata, found


def _number(file: BinaryIO, code: str) -> Any:
    """One little-endian number."""
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _string(file: BinaryIO) -> str:
    length = _number(file, "Q")
    if length > MOST:
        raise ValueError(f"a string of {length} bytes")
    return file.read(length).decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _number(file, SCALARS[kind])
    of, length = _number(file, "I"), _number(file, "Q")
    if length > MOST:
        raise ValueError(f"a list of {length} values")
    if of in SCALARS:
        code = f"<{length}{SCALARS[of]}"
        return list(struct.unpack(code, file.read(struct.calcsize(code))))
    return [_value(file, of) for _ in range(length)]


def _told(path: Path, metadata: dict[str, Any], tensors: list[tuple[str, int, int]]) -> GGUF:
    arch = metadata["general.architecture"]

    def field(key: str, other: int = 0) -> int:
        value = metadata.get(f"{arch}.{key}", other)
        return int(max(value) if isinstance(value, list) else value)

    layers, hidden, heads = field("block_count"), field("embedding_length"), field("attention.head_count")
    experts, used = field("expert_count"), field("expert_used_count")
    by_name = {name: parameters for name, parameters, _ in tensors}
    window, rank = field("attention.sliding_window"), field("attention.kv_lora_rank")
    shape = Shape(
        hidden=hidden, vocab=by_name["token_embd.weight"] // hidden, attention_layers=layers, heads=heads,
        kv_heads=field("attention.head_count_kv", heads), head_dim=field("attention.key_length", hidden // heads),
        value_dim=field("attention.value_length") or None, kv_rank=rank,
        rope_dim=field("rope.dimension_count") if rank else 0,
        windowed_layers=layers // 2 if window and arch in ALTERNATING else 0, window=window,
        moe_layers=layers if experts else 0, dense_layers=0 if experts else layers, experts=experts or 1,
        top_k=used or 1, tied="output.weight" not in by_name,
    )  # fmt: skip
    read = 0.0
    for name, _, held in tensors:
        if "_exps." in name:
            read += held * used / experts
        elif name != "token_embd.weight" or shape.tied:
            read += held
    size = Size(sum(held for _, _, held in tensors), read, sum(by_name.values()))
    mix = FTYPES.get(int(metadata.get("general.file_type", -1)))
    return GGUF(str(metadata.get("general.name") or path.stem), shape, field("context_length") or None, size, mix)
