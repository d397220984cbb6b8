"""A model that is computed while only one of its decoder layers is in memory.

transformers builds it without weights; a layer's are read when it is about to run and dropped when it has run. What is
outside of the layers, but for the head, stays. Each forward pass reads the whole model once.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc.model.build import hollow_model, load_config
from hpc.reuse.stored import StoredModel, logical_parameters


def streamed_model(folder: Path) -> Any:
    """The model in `folder` without its head, in fp32, for forward passes without gradients.

    Raises ArtifactError when the folder lacks a tensor that it has.
    """
    stored = StoredModel(folder)
    base = hollow_model(load_config(folder)).eval()
    for name, layer in base.named_children():
        if isinstance(layer, nn.ModuleList):
            for number, block in enumerate(layer):
                block.register_forward_pre_hook(_fill(stored, f"model.{name}.{number}."), with_kwargs=True)
                block.register_forward_hook(_drop)
        else:
            _load(stored, layer, f"model.{name}.")
    return base


def _fill(stored: StoredModel, prefix: str) -> Any:
    def hook(block: nn.Module, _arguments: Any, _keywords: Any) -> None:
        _load(stored, block, prefix)

    return hook


def _drop(block: nn.Module, _inputs: Any, _output: Any) -> None:
    block.to("meta")


def _load(stored: StoredModel, module: nn.Module, prefix: str) -> None:
    """Give a module the tensors whose names begin with `prefix`."""
    state = {}
    for name in module.state_dict():
        logical = list(logical_parameters({prefix + name: (1, 2, 1)}))
        parts = [stored.tensor(part).float() for part in logical]
        state[name] = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    module.load_state_dict(state, assign=True)
