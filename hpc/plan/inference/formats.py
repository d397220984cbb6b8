"""The formats that a model can be shipped in, and the bytes of a model in each.

Bits per weight with their scales: GGUF in hpc/shrink/gguf_mix.py; MLX affine in groups of 64 with a scale and
a bias of 16 bits each, mixed recipes as in mlx_lm/convert.py 0.32.2; compressed-tensors with a 16-bit scale per group
of 128 or per row, embedding, head and router in 16 bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

from hpc.plan.inference.gguf_mixes import MIXES
from hpc.plan.inference.gguf_mixes import bits as gguf_bits
from hpc.plan.inference.tensors import Tensor, tensors
from hpc.plan.shapes import Shape
from hpc.shrink.gguf_mix import more_bits

Family = Literal["transformers", "compressed-tensors", "gguf", "mlx"]
Kind = Literal["apple", "gpu", "cpu"]

RUNS_ON: Mapping[Family, tuple[Kind, ...]] = {
    "transformers": ("apple", "gpu", "cpu"), "compressed-tensors": ("gpu",), "gguf": ("apple", "gpu", "cpu"),
    "mlx": ("apple",),
}  # fmt: skip
"""Where a runtime computes with a family as it is, without unpacking it in memory first."""


@dataclass(frozen=True)
class Format:
    """One way to store a model."""

    name: str
    family: Family
    bits: Callable[[Tensor, Shape], float]
    """Bits per weight of a tensor, scales included."""

    @property
    def runs_on(self) -> tuple[Kind, ...]:
        """Kinds of machines for which it is shown."""
        return RUNS_ON[self.family]

    @property
    def made_by(self) -> str:
        """The stage that makes it."""
        if self.family == "transformers":
            return "what training and merging write"
        if self.name in ("int4", "int8"):
            return f"`kind: quantize`, `bits: {self.name[3:]}`"
        kind = "quantize" if self.family == "compressed-tensors" else "export"
        return f"`kind: {kind}`, `format: {self.name}`"


@dataclass(frozen=True)
class Size:
    """A model in a format."""

    weights: float
    """Bytes of all weights."""
    read: float
    """Bytes of the weights that one token reads."""
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        """Over all weights."""
        return 8 * self.weights / self.parameters


@cache
def size(shape: Shape, form: Format) -> Size:
    """Bytes of a model in a format, tensor by tensor."""
    weights = read = 0.0
    parameters = 0
    for tensor in tensors(shape):
        each = form.bits(tensor, shape) / 8
        weights += each * tensor.parameters
        read += each * tensor.parameters_read
        parameters += tensor.parameters
    return Size(weights, read, parameters)


def _sixteen(tensor: Tensor, shape: Shape) -> float:
    return 16.0


def _mlx(low: int, high: int, tensor: Tensor, shape: Shape) -> float:
    """Affine groups of 64; mlx-lm keeps the router in eight bits."""
    if tensor.role == "norm":
        return 16.0
    if tensor.role == "router":
        return 8.5
    more = tensor.role == "head" and not shape.tied
    if tensor.role in ("v", "down"):
        more = more_bits(tensor.layer, tensor.layers)
    return (high if more else low) + 32 / 64


def _compressed(weight_bits: int, group: int | None, tensor: Tensor, shape: Shape) -> float:
    """Linear layers and experts only; one scale of 16 bits for each group, or for each row."""
    if tensor.role in ("norm", "router", "embedding", "head"):
        return 16.0
    return weight_bits + 16 / (group or tensor.inputs)


_LIST = (
    Format("bf16", "transformers", _sixteen),
    Format("fp8", "compressed-tensors", partial(_compressed, 8, None)),
    Format("int8", "compressed-tensors", partial(_compressed, 8, 128)),
    Format("int4", "compressed-tensors", partial(_compressed, 4, 128)),
    *(Format(f"gguf-{mix}", "gguf", partial(gguf_bits, mix)) for mix in MIXES),
    *(Format(f"mlx-{low}bit", "mlx", partial(_mlx, low, low)) for low in (8, 6, 4)),
    *(Format(f"mlx-mixed_{low}_6", "mlx", partial(_mlx, low, 6)) for low in (4, 3)),
)
FORMATS: Mapping[str, Format] = {item.name: item for item in _LIST}
"""Formats by the names that stages use."""
