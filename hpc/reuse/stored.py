"""A transformers checkpoint on disk, read range by range: a rank takes the elements that it owns and no others.

Files hold an expert's matrices one by one or fused, under names that depend on the architecture and on the version that
wrote them. Here they have the logical names of hpc/train/fragments.py: w1 (E, I, H) gate, w3 (E, I, H) up and
w2 (E, H, I) down with all experts, and transformers' names for the rest. An element that no file holds, or a shape that
is another one, is refused with both values: nothing is left at random.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpc.errors import ArtifactError, DataError
from hpc.reuse.shape import read_config

ROLES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "w1": "w1", "w3": "w3", "w2": "w2"}
SINGLE = re.compile(rf"^(.*\.experts)\.(\d+)\.({'|'.join(ROLES)})\.weight$")
FUSED = re.compile(r"^(.*\.experts)\.(gate_up_proj|down_proj)$")
EXPERTS = re.compile(r"\.experts\.w[123]$")


@dataclass(frozen=True)
class Piece:
    """Where a run of a logical parameter's elements lies on disk."""

    file: Path
    tensor: str
    start: int
    """First element, in the flattened logical parameter."""
    rows: tuple[int, int]
    """First and last + 1 of the tensor's rows (its first dimension; of an expert's block, when it is fused)."""
    expert: int | None
    """Number in the first dimension of a fused tensor, whose second one `rows` then counts; None for a plain one."""
    width: int
    """Elements of a row."""


class StoredModel:
    """The tensors of a folder with config.json and safetensors files."""

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises DataError for a folder that is not a checkpoint of that kind."""
        self.folder = folder
        self.config = read_config(folder)
        self._pieces: dict[str, list[Piece]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Logical name -> shape, experts over all of them."""
        files = weight_files(folder)
        single: dict[tuple[str, str], dict[int, tuple[Path, str, tuple[int, ...]]]] = {}
        for path in files:
            for tensor, shape in _header(path):
                if found := SINGLE.match(tensor):
                    name = _logical(found[1])
                    single.setdefault((name, ROLES[found[3]]), {})[int(found[2])] = (path, tensor, shape)
                elif found := FUSED.match(tensor):
                    self._add_fused(_logical(found[1]), found[2], path, tensor, shape)
                else:
                    self._add(_logical(tensor), path, tensor, shape)
        for (name, role), experts in single.items():
            self._add_experts(f"{name}.{role}", experts)

    def _add(self, name: str, path: Path, tensor: str, shape: tuple[int, ...]) -> None:
        rows = shape[0] if shape else 1
        self.shapes[name] = shape
        self._pieces[name] = [Piece(path, tensor, 0, (0, rows), None, math.prod(shape[1:]))]

    def _add_fused(self, name: str, part: str, path: Path, tensor: str, shape: tuple[int, ...]) -> None:
        experts, rows, width = shape
        halves = {"w1": (0, rows // 2), "w3": (rows // 2, rows)} if part == "gate_up_proj" else {"w2": (0, rows)}
        for role, (first, last) in halves.items():
            self.shapes[f"{name}.{role}"] = (experts, last - first, width)
            block = (last - first) * width
            self._pieces[f"{name}.{role}"] = [
                Piece(path, tensor, expert * block, (first, last), expert, width) for expert in range(experts)
            ]

    def _add_experts(self, name: str, experts: dict[int, tuple[Path, str, tuple[int, ...]]]) -> None:
        missing = sorted(set(range(max(experts) + 1)) - experts.keys())
        if missing:
            raise ArtifactError(f"{self.folder}: {name} lacks expert {missing[0]} of {max(experts) + 1}")
        shapes = {shape for _, _, shape in experts.values()}
        if len(shapes) > 1:
            raise ArtifactError(f"{self.folder}: the experts of {name} have different shapes: {sorted(shapes)}")
        (rows, width) = shapes.pop()
        self.shapes[name] = (len(experts), rows, width)
        self._pieces[name] = [
            Piece(path, tensor, expert * rows * width, (0, rows), None, width)
            for expert, (path, tensor, _) in sorted(experts.items())
        ]

    def fill(self, name: str, start: int, target: Tensor) -> None:
        """Copy elements start.. of the flattened parameter `name` into the flat tensor `target`, in its precision.

        Raises ArtifactError when the checkpoint does not hold them.
        """
        filled, end = 0, start + target.numel()
        for piece in self._pieces.get(name, []):
            first, last = max(start, piece.start), min(end, piece.start + (piece.rows[1] - piece.rows[0]) * piece.width)
            if first >= last:
                continue
            target[first - start : last - start].copy_(self._read(piece, first - piece.start, last - piece.start))
            filled += last - first
        if filled != target.numel():
            raise ArtifactError(f"{self.folder} holds {filled:,} of {target.numel():,} elements of {name}")

    def _read(self, piece: Piece, first: int, last: int) -> Tensor:
        """Elements first..last of a piece; whole rows are read and cut."""
        low, high = first // piece.width, -(-last // piece.width)
        with safe_open(str(piece.file), framework="pt") as file:
            view = file.get_slice(piece.tensor)
            if not view.get_shape():
                scalar: Tensor = file.get_tensor(piece.tensor).reshape(1)
                return scalar
            rows = slice(piece.rows[0] + low, piece.rows[0] + high)
            values: Tensor = view[rows] if piece.expert is None else view[piece.expert : piece.expert + 1, rows]
        flat = values.reshape(-1)
        offset = first - low * piece.width
        return flat[offset : offset + last - first]

    def tensor(self, name: str) -> Tensor:
        """A whole logical parameter, in the precision of the file."""
        shape = self.shapes.get(name)
        if shape is None:
            raise ArtifactError(f"{self.folder} holds no {name}")
        first = self._pieces[name][0]
        with safe_open(str(first.file), framework="pt") as file:
            dtype = _DTYPES[file.get_slice(first.tensor).get_dtype()]
        values = torch.empty(math.prod(shape), dtype=dtype)
        self.fill(name, 0, values)
        return values.view(shape)

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Compare with the parameters that a model has; returns how many tensors and elements matched.

        Raises ArtifactError that names the first parameter which is missing, left over, or of another shape.
        """
        for name, shape in wanted.items():
            if name not in self.shapes:
                raise ArtifactError(f"{self.folder} holds no {name}: it would stay random")
            if self.shapes[name] != shape:
                raise ArtifactError(f"{self.folder}: {name} is {self.shapes[name]}, the model wants {shape}")
        left = sorted(name for name in self.shapes.keys() - wanted.keys() if not name.endswith(IGNORED))
        if left:
            raise ArtifactError(f"{self.folder} holds {left[0]}, which the model has no place for ({len(left)} such)")
        return {"tensors": len(wanted), "elements": sum(math.prod(shape) for shape in wanted.values())}


IGNORED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of the names of buffers that old checkpoints hold and models compute."""
_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "I8": torch.int8,
}  # fmt: skip


def logical_parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """transformers' parameters in memory by their logical names: gate_up_proj (E, 2I, H) becomes w1 and w3."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if match := FUSED.match(name):
            experts, rows, width = shape
            parts = ("w1", "w3") if match[2] == "gate_up_proj" else ("w2",)
            found.update({f"{match[1]}.{part}": (experts, rows // len(parts), width) for part in parts})
        else:
            found[_logical(name)] = shape
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the index names, or all of them. Raises DataError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder}: the index names {missing[0]}, which is not there ({len(missing)} such)")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        has_pickle = any(folder.glob("*.bin"))
        why = "only pickle files, which can run code" if has_pickle else "no weights"
        raise DataError(f"{folder} holds {why}: take a checkpoint with safetensors files")
    return files


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                yield name, tuple(file.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}): fetch it again") from None


def _logical(name: str) -> str:
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return name.replace(".mlp.shared_expert.", ".mlp.shared_experts.").replace(
        ".mlp.shared_expert_gate.", ".mlp.shared_experts_gate."
    )
