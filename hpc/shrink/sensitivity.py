"""How much each part of a model disturbs its output when it is rounded to few bits, measured on calibration text.

A part is an expert, or a block of dense matrices that write to the residual stream together: attention, a feed-forward
block, shared experts. Its error is |f(x) - g(x)|^2 / |h|^2, summed over the tokens that it sees: f the part as it is, g
rounded to nearest, h the residual stream behind the layer. An expert's is weighted by its routing weights, so that one
with few or lightly weighted tokens counts little.

Shape letters: T tokens of a forward pass, H hidden size, I expert size, E experts, K experts per token.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpc.shrink.allocation import Unit
from hpc.shrink.calibration import Ids
from hpc.shrink.passport import batches

ROWS = 512
"""Tokens of a forward pass that an expert is tried on at most; what they show is scaled to all that it saw."""


def rounded(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """A matrix (rows, columns) rounded to nearest in groups of columns, and back. Scales in 16 bits."""
    groups = weight.reshape(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if symmetric:  # the end further from 0 is met exactly
        far = torch.where(high.abs() > low.abs(), -high, low)
        scale = _half(far / -(2 ** (bits - 1)))
        return ((groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).reshape(weight.shape)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = _half((high - low) / (2**bits - 1))
    zero = (-low / scale).round()
    return ((((groups / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale).reshape(weight.shape)


def _half(scale: Tensor) -> Tensor:
    scale = scale.half().float()
    return torch.where(scale == 0, torch.full_like(scale, 1e-5), scale)


def measure(model: nn.Module, ids: Ids, options: Sequence[int], group_size: int, symmetric: bool) -> dict[str, Unit]:
    """Every part of a transformers model without its head, by its name in the whole model, on ids (N, S)."""
    found = _Measured(options, group_size, symmetric)
    for name, layers in model.named_children():
        if isinstance(layers, nn.ModuleList):
            for number, layer in enumerate(layers):
                found.listen(f"model.{name}.{number}", layer)
    with torch.no_grad():
        for part in batches(ids):
            model(input_ids=part, use_cache=False)
    found.stop()
    return {name: Unit(found.parameters[name], errors, found.matrices[name]) for name, errors in found.errors.items()}


class _Measured:
    """Hooks on all parts, and what they saw."""

    def __init__(self, options: Sequence[int], group_size: int, symmetric: bool) -> None:
        self.errors: dict[str, dict[int, float]] = {}
        self.parameters: dict[str, int] = {}
        self.matrices: dict[str, tuple[str, ...]] = {}
        self._options, self._how = tuple(options), (group_size, symmetric)
        self._waiting: list[tuple[str, int, Tensor, Tensor | None, float]] = []
        """Part, bits, squared differences of its tokens, which tokens, and how many each stands for."""
        self._busy = False
        self._handles: list[Any] = []

    def listen(self, prefix: str, layer: nn.Module) -> None:
        """To the parts of a decoder layer."""
        for name, module in parts(layer):
            place = f"{prefix}.{name}"
            hook = self._experts(place) if _is_fused(module) else self._dense(place)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        self._handles.append(layer.register_forward_hook(self._settle, prepend=True))

    def stop(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _dense(self, place: str) -> Any:
        def hook(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            if self._busy:
                return
            named = [(name, child) for name, child in module.named_children() if isinstance(child, nn.Linear)]
            linear = [child for _, child in named]
            kept = [child.weight.data for child in linear]
            self.matrices[place] = tuple(f"{place}.{name}" for name, _ in named)
            self.parameters[place] = sum(weight.numel() for weight in kept)
            for bits in self._options:
                for child, weight in zip(linear, kept, strict=True):
                    child.weight.data = rounded(weight, bits, *self._how)
                self._busy = True
                other = module(*arguments, **keywords)
                self._busy = False
                self._wait(place, bits, _first(other) - _first(output), None, 1.0)
            for child, weight in zip(linear, kept, strict=True):
                child.weight.data = weight

        return hook

    def _experts(self, place: str) -> Any:
        def hook(module: Any, arguments: Any, keywords: Any, _output: Any) -> None:
            x_TH, chosen_TK, weights_TK = (*arguments, *keywords.values())[:3]
            x_TH = x_TH.reshape(-1, x_TH.shape[-1])
            for expert in range(module.gate_up_proj.shape[0]):
                name = f"{place}.{expert}"
                gate_up, down = module.gate_up_proj[expert], module.down_proj[expert]
                self.parameters[name] = gate_up.numel() + down.numel()
                self.matrices[name] = tuple(f"{name}.{part}_proj" for part in ("gate", "up", "down"))
                tokens, slots = torch.where(chosen_TK == expert)
                stride = max(1, len(tokens) // ROWS)
                rows, stands_for = tokens[::stride], len(tokens) / max(1, len(tokens[::stride]))
                share = weights_TK[rows, slots[::stride], None]
                wanted = _feed_forward(module, x_TH[rows], gate_up, down)
                for bits in self._options:
                    other = _feed_forward(
                        module, x_TH[rows], rounded(gate_up, bits, *self._how), rounded(down, bits, *self._how)
                    )
                    self._wait(name, bits, share * (other - wanted), rows, stands_for)

        return hook

    def _wait(self, name: str, bits: int, difference: Tensor, tokens: Tensor | None, stands_for: float) -> None:
        squares = difference.reshape(-1, difference.shape[-1]).square().sum(-1)
        self._waiting.append((name, bits, squares, tokens, stands_for))

    def _settle(self, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        """The layer is done: what its parts did is set against its output."""
        stream = _first(output)
        size_T = stream.reshape(-1, stream.shape[-1]).square().sum(-1).clamp_min(1e-12)
        for name, bits, squares, tokens, stands_for in self._waiting:
            error = float((squares / (size_T if tokens is None else size_T[tokens])).sum()) * stands_for
            errors = self.errors.setdefault(name, {})
            errors[bits] = errors.get(bits, 0.0) + error
        self._waiting.clear()


def parts(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Fused experts, and modules that hold linear layers, but for a MoE block, whose own are gates."""
    for name, module in layer.named_modules():
        children = list(module.children())
        if _is_fused(module) or (
            any(isinstance(child, nn.Linear) for child in children) and not any(map(_is_fused, children))
        ):
            yield name, module


def _is_fused(module: nn.Module) -> bool:
    return getattr(module, "gate_up_proj", None) is not None and not isinstance(module.gate_up_proj, nn.Module)


def _feed_forward(module: Any, x_TH: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert: gate_up (2 I, H), down (H, I)."""
    gate_TI, up_TI = functional.linear(x_TH, gate_up).chunk(2, -1)
    return functional.linear(module.act_fn(gate_TI) * up_TI, down)


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
