"""How the blocks of a transformers model compute: attention kernel, recomputation, compilation.

`prepare_blocks` works on the plain model, before DeepSpeed puts its expert layers in place, `overlap_shared_experts`
after.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpc.config import TrainingBase
from hpc.errors import ConfigError


def prepare_blocks(model: nn.Module, settings: TrainingBase) -> None:
    """Apply `attention_kernel`, `recompute` and `compile`. Raises ConfigError for a kernel that is not here."""
    tuned: Any = model
    if settings.attention_kernel != "auto":
        try:
            tuned.set_attn_implementation(settings.attention_kernel)
        except (ImportError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"train.attention_kernel = {settings.attention_kernel} cannot be had here ({reason}): take sdpa"
            ) from None
    if settings.compile:
        for block in _attention_blocks(model):
            block.compile()
    if settings.recompute == "full":
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
    elif settings.recompute == "attention":
        for block in _attention_blocks(model):
            block.forward = MethodType(_recomputed(type(block).forward), block)


def overlap_shared_experts(model: nn.Module) -> None:
    """Compute shared experts on a stream of their own while expert-parallel ranks exchange tokens. CUDA only.

    DeepSpeed's layer computes them after the exchange. Here they start when the layer does, and where it asks for them
    the result is waited for; the backward pass follows the same streams. Not for ZeRO 3, which fetches weights on the
    stream at work.
    """
    for layer in model.modules():
        if getattr(layer, "_is_autoep_layer", False) and isinstance(getattr(layer, "shared_experts", None), nn.Module):
            _Lane(layer)


class _Lane:
    """The stream of one layer's shared experts."""

    def __init__(self, layer: Any) -> None:
        self._stream = torch.cuda.Stream()
        self._compute: Callable[[torch.Tensor], torch.Tensor] = layer.shared_experts.forward
        self._result: torch.Tensor | None = None
        layer.shared_experts.forward = self._finish
        layer.register_forward_pre_hook(self._begin)

    def _begin(self, _layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._result = self._compute(inputs[0])

    def _finish(self, _hidden: torch.Tensor) -> torch.Tensor:
        result, self._result = self._result, None
        assert result is not None, "the layer's forward began elsewhere"
        here = torch.cuda.current_stream()
        here.wait_stream(self._stream)
        result.record_stream(here)
        return result


def _attention_blocks(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".self_attn")]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward, whose activations are dropped and computed again for the backward pass (arXiv:1604.06174)."""

    def with_checkpoint(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return forward(self, *arguments, **named)
        return checkpoint(forward, self, *arguments, use_reentrant=False, **named)

    return with_checkpoint
