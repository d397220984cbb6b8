"""Which matrices of a model are held in four bits, and how they get there without ever being whole.

Those of attention and feed-forward blocks are, experts included; routers, norms, embeddings and the head are not: they
are small, and what the model chooses with. The model is built without weights; `hollow` takes the place of the matrices
away before DeepSpeed sees the model, which would copy and send them, and `pack` reads them one by one into four bits.
DeepSpeed looks at the experts' shapes when it puts its expert-parallel layers in place, so until `settle` they stay as
parameters of width one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc.model.four_bit import FourBitExperts, FourBitLinear, FourBitMatrix, library

Widths = dict[str, int]
"""Name of a layer's experts -> their intermediate width."""


def hollow(model: nn.Module) -> Widths:
    """Take the frozen matrices of the blocks out of a model whose weights are yet to come, in place.

    Raises ConfigError where nothing can pack them here.
    """
    library()
    widths = {}
    for name, module in list(model.named_modules()):
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            experts: Any = module
            number, hidden, width = experts.down_proj.shape
            widths[name] = width
            for part, shape in (("gate_up_proj", (number, 2, hidden)), ("down_proj", (number, hidden, 1))):
                setattr(experts, part, nn.Parameter(torch.zeros(shape), requires_grad=False))
        for child, layer in list(module.named_children()):
            if _is_packed(f"{name}.{child}", layer):
                setattr(module, child, FourBitLinear(layer))
    return widths


def _is_packed(name: str, layer: nn.Module) -> bool:
    """A linear layer of a block, by the names that transformers' models share: q_proj, kv_a_proj_with_mqa, up_proj."""
    if type(layer) is not nn.Linear or layer.weight.requires_grad or ".layers." not in name:
        return False
    return "_proj" in name.removesuffix(".base_layer").rsplit(".", 1)[-1]


def settle(model: nn.Module, widths: Widths) -> None:
    """Give the experts' matrices their place, in transformers' layers or in DeepSpeed's, which have replaced them."""
    for name, width in widths.items():
        experts: Any = model.get_submodule(name)
        down = "down_proj" if hasattr(experts, "down_proj") else "w2"
        number, hidden, _ = getattr(experts, down).shape
        places: dict[str, tuple[str, ...]] = {"w1": ("w1",), "w3": ("w3",)}
        if down == "down_proj":
            places = {"gate_up_proj": ("w1", "w3")}
        for place, roles in places.items():
            delattr(experts, place)
            setattr(experts, place, FourBitExperts(number, width * len(roles), hidden, roles))
        delattr(experts, down)
        setattr(experts, down, FourBitExperts(number, hidden, width, ("w2",)))


@dataclass(frozen=True)
class Packed:
    """A matrix that is held in four bits."""

    name: str
    """Of its parameter; those of experts are w1, w3 and w2 in every layout."""
    shape: tuple[int, ...]
    """Of what this rank holds of the parameter: (O, D), or (E, O, D) with its experts."""
    start: int
    """First element, in the flattened part that this rank holds."""
    matrix: FourBitMatrix


def packed_matrices(model: nn.Module) -> Iterator[Packed]:
    """All that a model holds in four bits, in the same order on all ranks."""
    for name, module in model.named_modules():
        if isinstance(module, FourBitLinear):
            yield Packed(f"{name}.weight", module.matrix.shape, 0, module.matrix)
        for held in vars(module).values():
            if isinstance(held, FourBitExperts):
                for expert, matrices in enumerate(held.matrices):
                    for role, matrix in zip(held.roles, matrices, strict=True):
                        shape = (len(held.matrices), *matrix.shape)
                        yield Packed(f"{name}.{role}", shape, expert * math.prod(matrix.shape), matrix)


def pack(model: nn.Module, read: Callable[[Packed, Tensor], None], device: str) -> None:
    """Read all matrices, each into a flat tensor in fp32, and pack them, one after the other."""
    for packed in packed_matrices(model):
        packed.matrix.reserve(device)
    for packed in packed_matrices(model):
        values = torch.empty(math.prod(packed.matrix.shape))
        read(packed, values)
        packed.matrix.pack(values.view(packed.matrix.shape).to(device))


def bits_per_weight(model: nn.Module) -> float | None:
    """Bits that a packed weight takes, as counted; None where nothing is packed."""
    held = [packed.matrix for packed in packed_matrices(model)]
    weights = sum(math.prod(matrix.shape) for matrix in held)
    return 8 * sum(matrix.nbytes for matrix in held) / weights if weights else None
