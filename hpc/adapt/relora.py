"""ReLoRA (arXiv:2307.05695): low-rank updates that add up to a high-rank one.

At the end of a cycle every adapter is merged into its frozen matrix and begins anew (A random, B zero), and the
optimizer forgets most of what it knew about it, so that the next cycle goes in other directions. Works on whatever
layout the engine has: each rank merges what it holds, in the same way as its replicas; new values and what is forgotten
depend on the seed, the cycle and the matrix alone.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc.errors import StageError
from hpc.model.adapters import LowRank, adapted_layers, first_A
from hpc.train.corruption import bit_sum
from hpc.train.engine import Engine
from hpc.train.fragments import Fragment

Prune = Literal["zero", "random", "magnitude"]
MOMENTS = ("exp_avg", "exp_avg_sq")
TOLERANCE = 0.02
"""Largest accepted distance of the fraction that was forgotten from the one asked for, where chance or ties decide."""


@dataclass(frozen=True)
class Adapted:
    """A matrix, or one matrix of each expert, with its adapter."""

    name: str
    bases: tuple[nn.Parameter, ...]
    """What the adapter's product is added to: one matrix; gate and up where they are two."""
    A: nn.Parameter
    B: nn.Parameter
    module: Any
    """peft's layer, or ours for experts."""

    def delta(self) -> Tensor:
        """What merging adds, whole parameters at hand."""
        if isinstance(self.module, LowRank):
            return self.module.delta(self.A, self.B)
        scaled: Tensor = (self.B @ self.A) * self.module.scaling["default"]
        return scaled

    def merge(self) -> None:
        """Add the adapter to its matrix."""
        delta = self.delta()
        parts = delta.chunk(len(self.bases), 1) if len(self.bases) > 1 else (delta,)
        for base, part in zip(self.bases, parts, strict=True):
            base.add_(part.to(base.dtype))


def adapted_matrices(model: nn.Module) -> Iterator[Adapted]:
    """Every adapted matrix, in the same order on all ranks."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            layer: Any = module
            yield Adapted(
                name, (layer.get_base_layer().weight,), layer.lora_A["default"].weight,
                layer.lora_B["default"].weight, layer,
            )  # fmt: skip
    for name, layer, adapters in adapted_layers(model):
        experts: Any = layer.get_submodule("mlp.experts")
        fused = hasattr(experts, "gate_up_proj")
        ups = (experts.gate_up_proj,) if fused else (experts.w1, experts.w3)
        down = experts.down_proj if fused else experts.w2
        for part, bases, adapter in (("gate_up", ups, adapters.gate_up), ("down", (down,), adapters.down)):
            yield Adapted(f"{name} {part}", bases, adapter.A, adapter.B, adapter)


def merge_in_place(model: nn.Module) -> None:
    """Add every adapter to its matrix, whole parameters at hand."""
    with torch.no_grad():
        for matrix in adapted_matrices(model):
            matrix.merge()


def restart(engine: Engine, done: int, seed: int, prune: Prune, ratio: float) -> dict[str, Any]:
    """End a cycle after `done` steps: merge, begin anew, forget. Collective; returns figures for the row of metrics.

    Raises StageError when the optimizer did not forget what it should.
    """
    others = _moments_of_others(engine)
    for matrix in adapted_matrices(engine.module):
        engine.rewrite([*matrix.bases, matrix.A, matrix.B], partial(_begin_anew, engine, matrix, seed, done))
    _forget(engine, seed, done, prune, ratio)
    forgotten = _forgotten(engine)
    wanted = 1.0 if prune == "zero" else ratio
    if forgotten < wanted - TOLERANCE:
        raise StageError(f"step {done}: the optimizer forgot {forgotten:.3f} of the adapters' moments, not {wanted:g}")
    if _moments_of_others(engine) != others:
        raise StageError(f"step {done}: the restart changed moments of parameters that have no adapter")
    return {"merged": True, "optimizer_forgot": round(forgotten, 6)}


def _begin_anew(engine: Engine, matrix: Adapted, seed: int, done: int) -> None:
    matrix.merge()
    start = zlib.crc32(f"{seed} {matrix.name} {done}".encode())
    if isinstance(matrix.module, LowRank):
        place = engine.place
        experts, rank, width = matrix.A.shape
        matrix.A.copy_(first_A(experts * place.size, rank, width, start).chunk(place.size)[place.rank])
    else:
        bound = 1 / math.sqrt(matrix.A.shape[1])
        values = torch.empty(matrix.A.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(start))
        matrix.A.copy_(values)
    matrix.B.zero_()


def _adapters(engine: Engine) -> set[str]:
    """Names of the adapters' own parameters."""
    own = {id(parameter) for matrix in adapted_matrices(engine.module) for parameter in (matrix.A, matrix.B)}
    return {name for name, parameter in engine.module.named_parameters() if id(parameter) in own}


def _forgotten(engine: Engine) -> float:
    """The fraction of the adapters' moments that is zero, as the optimizer has them now. Collective."""
    zeros, names = torch.zeros(2, dtype=torch.float64, device=engine.device), _adapters(engine)
    for name, fragment in engine.moments().items():
        if name in names:
            for moment in MOMENTS:
                values = fragment.values[moment]
                zeros += torch.tensor([int((values == 0).sum()), len(values)], device=engine.device)
    dist.all_reduce(zeros)
    return float(zeros[0] / zeros[1])


def _moments_of_others(engine: Engine) -> int:
    """A sum over the bits of this rank's moments of everything but adapters: another one after any change."""
    names = _adapters(engine)
    return sum(
        int(bit_sum(fragment.values[moment]))
        for name, fragment in engine.moments().items()
        if name not in names
        for moment in MOMENTS
        if moment in fragment.values
    )


def _forget(engine: Engine, seed: int, done: int, prune: Prune, ratio: float) -> None:
    """Set moments of the adapters to zero: all, a random part, or the smallest. Collective.

    The same elements of both moments go, by the first one's magnitude: a mean that outlives its variance would be
    divided by next to nothing in the next update.
    """
    owned = engine.moments()
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for matrix in adapted_matrices(engine.module):
        for parameter in (matrix.A, matrix.B):
            name = names[id(parameter)]
            fragment = owned.get(name)
            size = math.prod(engine.whole_shape(name, parameter))
            keep = _kept(fragment, size, prune, ratio, f"{seed} {name} {done}", engine.device)
            if fragment is None:
                continue
            for moment in MOMENTS:
                values = fragment.values[moment]
                values.mul_(keep[fragment.start : fragment.start + len(values)].to(values.device))


def _kept(fragment: Fragment | None, size: int, prune: Prune, ratio: float, key: str, device: str) -> Tensor:
    """Which of a parameter's `size` elements the optimizer keeps its moments of, wherever they are. Collective."""
    if prune == "zero":
        return torch.zeros(size, dtype=torch.bool, device=device)
    if prune == "random":
        return torch.rand(size, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))) >= ratio
    whole = torch.zeros(size, device=device)
    if fragment is not None:
        means = fragment.values[MOMENTS[0]]
        whole[fragment.start : fragment.start + len(means)] = means.abs()
    dist.all_reduce(whole)
    return whole > whole.kthvalue(max(1, math.ceil(ratio * size))).values
