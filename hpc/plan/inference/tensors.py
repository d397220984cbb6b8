"""The matrices of a model one by one, as quantizers see them: what they are for, in which layer, how wide, how many.

Names of roles follow llama.cpp, because its mixes give each role and layer a type of its own. Biases are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hpc.plan.shapes import Shape

Role = Literal["embedding", "head", "q", "k", "v", "output", "latent", "state", "router", "gate", "up", "down", "norm"]
"""latent: projections of multi-head latent attention but the last; state: those of state-space layers."""


@dataclass(frozen=True)
class Tensor:
    """Matrices of one kind in one layer."""

    role: Role
    inputs: int
    """Length of a row: blocks of weights that share a scale lie along it."""
    outputs: int
    layer: int = 0
    """Counted over the layers that have this kind."""
    layers: int = 1
    """How many layers have it."""
    count: int = 1
    """How many there are in the layer: E for experts."""
    read: int = 1
    """How many of them one token reads: K for experts, none for the input embedding (one row of it)."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.inputs * self.outputs * self.count

    @property
    def parameters_read(self) -> int:
        """Those that one token reads."""
        return self.inputs * self.outputs * self.read


def tensors(shape: Shape) -> list[Tensor]:
    """All matrices and norms of a model. A tied embedding is one tensor, read as the head."""
    found = [Tensor("head", shape.hidden, shape.vocab)]
    if not shape.tied:
        found.append(Tensor("embedding", shape.hidden, shape.vocab, read=0))
    feed_forward = shape.dense_layers + shape.moe_layers
    for layer in range(shape.attention_layers):
        found += [replace(one, layer=layer, layers=shape.attention_layers) for one in _attention(shape)]
    for layer in range(feed_forward):
        parts = _dense(shape) if layer < shape.dense_layers else _experts(shape)
        found += [replace(one, layer=layer, layers=feed_forward) for one in parts]
    for inputs, outputs in shape.mamba_products():
        found += [Tensor("state", inputs, outputs, n, shape.mamba_layers) for n in range(shape.mamba_layers)]
    norms = shape.attention_layers + feed_forward + shape.mamba_layers + 1
    return [*found, Tensor("norm", shape.hidden, norms)]


def _attention(shape: Shape) -> Iterator[Tensor]:
    h, q = shape.hidden, shape.heads * shape.head_dim
    if not shape.kv_rank:
        yield Tensor("q", h, q)
        yield Tensor("k", h, shape.kv_heads * shape.head_dim)
        yield Tensor("v", h, shape.kv_heads * shape.values)
    elif shape.query_rank:
        yield Tensor("latent", h, shape.query_rank)
        yield Tensor("latent", shape.query_rank, q)
    else:
        yield Tensor("q", h, q)
    if shape.kv_rank:
        yield Tensor("latent", h, shape.kv_rank + shape.rope_dim)
        yield Tensor("latent", shape.head_dim - shape.rope_dim, shape.kv_rank * shape.heads)
        yield Tensor("latent", shape.kv_rank, shape.values * shape.heads)
    yield Tensor("output", shape.heads * shape.values, h)


def _feed_forward(shape: Shape, inputs: int, width: int, count: int = 1, read: int = 1) -> Iterator[Tensor]:
    if width:
        if shape.gated:
            yield Tensor("gate", inputs, width, count=count, read=read)
        yield Tensor("up", inputs, width, count=count, read=read)
        yield Tensor("down", width, inputs, count=count, read=read)


def _dense(shape: Shape) -> Iterator[Tensor]:
    yield from _feed_forward(shape, shape.hidden, shape.dense_size)


def _experts(shape: Shape) -> Iterator[Tensor]:
    yield from _feed_forward(shape, shape.latent or shape.hidden, shape.expert_size, shape.experts, shape.top_k)
    yield from _feed_forward(shape, shape.hidden, shape.shared_size)
    yield Tensor("router", shape.hidden, shape.experts)
    if shape.latent:
        yield Tensor("latent", shape.hidden, shape.latent)
        yield Tensor("latent", shape.latent, shape.hidden)
