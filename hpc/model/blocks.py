"""How the blocks of a transformers model compute: attention kernel, recomputation, compilation.

Applied to the plain model, before DeepSpeed puts its expert layers in place.
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


def _attention_blocks(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".self_attn")]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward, whose activations are dropped and computed again for the backward pass (arXiv:1604.06174)."""

    def with_checkpoint(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return forward(self, *arguments, **named)
        return checkpoint(forward, self, *arguments, use_reentrant=False, **named)

    return with_checkpoint
