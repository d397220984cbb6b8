"""The formats of the `export` stage behind one face: convert, quantize, read back, count."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from hpc.shrink.matrices import Named


class LaptopFormat(Protocol):
    """One way to keep a model for a laptop."""

    runtime: str
    """Who reads it: llama.cpp or mlx."""
    bits: float
    """Of most weights, scales not counted."""
    accepted_conversion_kl: float
    """Largest KL divergence (nats per token) of the unquantized file from its source."""

    def convert(self, source: Path, scratch: Path) -> Path:
        """Write the model unquantized under `scratch`; returns what the runtime opens. Raises DataError for a model
        that the runtime does not have."""
        ...

    def write(self, source: Path, plain: Path, folder: Path) -> Path:
        """Write the artifact into `folder`; returns what the runtime opens."""
        ...

    def matrices(self, path: Path) -> Iterator[Named]:
        """All parameters of a file or folder, dequantized, each expert's by itself, always in the same order."""
        ...

    def census(self, path: Path) -> dict[str, Any]:
        """By group of tensors: tensors, parameters, bytes, bits_per_weight, types."""
        ...


def laptop_format(name: str, group_size: int) -> LaptopFormat:
    """The format of a name of the `export` stage, such as gguf-q4_k_m."""
    family, _, kind = name.partition("-")
    if family == "gguf":
        from hpc.shrink.gguf import Gguf

        return Gguf(kind)
    from hpc.shrink.mlx_export import Mlx

    return Mlx(kind, group_size)
