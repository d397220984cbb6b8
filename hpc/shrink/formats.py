"""The formats of the `export` stage behind one face: convert, quantize, read back, count."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpc.model.build import load_config
from hpc.shrink import gguf, gguf_file, mlx_export, mlx_folder
from hpc.shrink.matrices import Named

Importance = Mapping[str, npt.NDArray[np.float32]]


class LaptopFormat(Protocol):
    """One way to keep a model for a laptop."""

    runtime: str
    """Who reads it: llama.cpp or mlx."""
    bits: int
    """Of most weights, scales not counted."""
    accepted_conversion_kl: float
    """Largest KL divergence (nats per token) of the unquantized file from its source."""

    def convert(self, source: Path, scratch: Path) -> Path:
        """Write the model unquantized under `scratch`; returns what the runtime opens. Raises DataError for a model
        that the runtime does not have."""
        ...

    def write(self, source: Path, plain: Path, folder: Path, importance: Importance) -> Path:
        """Write the artifact into `folder`, working beside `plain`; returns what the runtime opens. importance: of the
        columns of matrices, by tensors of a .gguf file (hpc.shrink.importance); may be empty, MLX has no use for it."""
        ...

    def matrices(self, path: Path) -> Iterator[Named]:
        """All parameters of a file or folder, dequantized, each expert's by itself, always in the same order."""
        ...

    def census(self, path: Path) -> dict[str, Any]:
        """By group of tensors: tensors, parameters, bytes, bits_per_weight, types."""
        ...


BITS = {
    "f16": 16, "q8_0": 8, "q6_k": 6, "q5_k_m": 5, "q4_k_m": 4, "iq4_xs": 4, "q4_0": 4, "q3_k_m": 3, "q2_k": 2,
}  # fmt: skip
"""Of most weights of a GGUF type."""


class Gguf:
    """A file that llama.cpp reads."""

    runtime = "llama.cpp"

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.bits = BITS[kind]
        self.accepted_conversion_kl = 1e-5

    def convert(self, source: Path, scratch: Path) -> Path:
        """As in LaptopFormat."""
        self.accepted_conversion_kl = conversion_kl(source)
        plain = scratch / "plain.gguf"
        gguf.convert(source, plain)
        return plain

    def write(self, source: Path, plain: Path, folder: Path, importance: Importance) -> Path:
        """As in LaptopFormat."""
        path = folder / f"model-{self._kind}.gguf"
        if self._kind == "f16":
            gguf.convert(source, path, "f16")
        else:
            gguf.quantize(plain, path, self._kind, plain.parent, importance=importance)
        return path

    def matrices(self, path: Path) -> Iterator[Named]:
        """As in LaptopFormat."""
        return gguf_file.matrices(path)

    def census(self, path: Path) -> dict[str, Any]:
        """As in LaptopFormat."""
        return gguf.census(next(path.glob("*.gguf")) if path.is_dir() else path)


def conversion_kl(source: Path) -> float:
    """Largest accepted divergence of an unquantized file: runtimes compute in fp32 what is kept in it; what is kept in
    bf16 some round on the way."""
    return 1e-3 if "bfloat16" in str(load_config(source).dtype) else 1e-5


class Mlx:
    """A folder that mlx-lm reads."""

    runtime = "mlx"

    def __init__(self, kind: str, group_size: int) -> None:
        self._kind, self._group_size = kind, group_size
        self.bits = mlx_export.MLX_TYPES[kind].bits or 16
        self.accepted_conversion_kl = 1e-5

    def convert(self, source: Path, scratch: Path) -> Path:
        """As in LaptopFormat: in the precision that the source is kept in."""
        kind = "bf16" if "bfloat16" in str(load_config(source).dtype) else "f32"
        self.accepted_conversion_kl = conversion_kl(source)
        plain = scratch / "plain"
        mlx_export.export(source, plain, kind, scratch / "converting")
        return plain

    def write(self, source: Path, plain: Path, folder: Path, importance: Importance) -> Path:
        """As in LaptopFormat."""
        folder.rmdir()
        mlx_export.export(source, folder, self._kind, plain.with_name("quantizing"), group_size=self._group_size)
        return folder

    def matrices(self, path: Path) -> Iterator[Named]:
        """As in LaptopFormat."""
        return mlx_folder.matrices(path)

    def census(self, path: Path) -> dict[str, Any]:
        """As in LaptopFormat."""
        return mlx_folder.census(path)


def laptop_format(name: str, group_size: int) -> LaptopFormat:
    """The format of a name of the `export` stage, such as gguf-q4_k_m."""
    family, _, kind = name.partition("-")
    return Gguf(kind) if family == "gguf" else Mlx(kind, group_size)
