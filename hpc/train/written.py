"""Files of a checkpoint, hashed while they are written: what the manifest states is what was in memory.

Tensors go into the safetensors format (8 bytes of header size, a JSON header, the values one after the other). The
library's own writer hands back no hash and copies each tensor once more, so the header is made here; its reader reads.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

BLOCK = 1 << 24
"""Bytes that are written and hashed at a time."""

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
"""How safetensors calls a type."""


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint as its manifest lists it."""

    path: str
    """Relative to the checkpoint."""
    bytes: int
    xxh3_128: str

    @classmethod
    def read(cls, path: Path) -> "Written":
        """What a small file holds now."""
        return cls(path.name, path.stat().st_size, hash_file(path))


def hash_file(path: Path) -> str:
    """XXH3-128 of a file's bytes: 20 GB/s a core, against accidents; artifacts carry SHA-256."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
    return state.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Written:
    """Write tensors of any device as a safetensors file that is on the disk when this returns. Raises OSError."""
    state, size = xxhash.xxh3_128(), 0
    with path.open("wb") as file:
        for block in _blocks(tensors, metadata):
            file.write(block)
            state.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return Written(path.name, size, state.hexdigest())


def _blocks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview | bytes]:
    """The file's bytes. Wide types come first, so that every value lies at a multiple of its size."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        values = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        for start in range(0, len(values), BLOCK):
            yield values[start : start + BLOCK]
