"""Adapters folded into their base: one, or several combined (task arithmetic, arXiv:2212.04089; TIES, arXiv:2306.01708;
DARE, arXiv:2311.03099).

What is combined are the deltas of whole matrices, an expert's by itself, not the factors A and B: those of different
adapters have no common basis. A sum is compared with what peft computes with all adapters active.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import merge_utils
from torch import Tensor
from transformers import PreTrainedModel

from hpc.errors import ArtifactError
from hpc.model.exactness import Difference, difference, exact_logits


@dataclass(frozen=True)
class Merged:
    """A base with adapters folded in."""

    model: PreTrainedModel
    difference: Difference | None
    """Of the logits from those of base + adapters; None where combining is no sum."""
    changed: dict[str, tuple[int, int]]
    """Matrices that changed, and adapted ones, of experts (each by itself) and of the rest."""


def merge(
    base: PreTrainedModel,
    adapters: list[tuple[Path, float]],
    probe: Tensor,
    combination: str,
    density: float,
    seed: int,
) -> Merged:
    """Fold adapters with weights into the base, in fp32; `probe` (B, S) are ids to compare logits on.

    combination: linear, ties, dare_linear or dare_ties; the last three keep a fraction `density` of each delta.
    Raises ArtifactError when an adapter changes nothing.
    """
    adapted: Any = PeftModel.from_pretrained(base, str(adapters[0][0]), adapter_name="0").eval()
    for number, (folder, _) in enumerate(adapters[1:], 1):
        adapted.load_adapter(str(folder), adapter_name=str(number))
    names, weights = [str(number) for number in range(len(adapters))], [weight for _, weight in adapters]
    expected = _logits_with_all(adapted, names, weights, probe) if combination == "linear" else None
    changed = {"experts": (0, 0), "others": (0, 0)}
    torch.manual_seed(seed)  # DARE drops at random
    with torch.no_grad():
        for parameter, deltas in _deltas(adapted, names):
            for name, delta in zip(names, deltas, strict=True):
                if not delta.any():
                    raise ArtifactError(
                        f"{adapters[int(name)][0]} does not change the model: it was not trained, or not loaded"
                    )
            combined = _combine(deltas, weights, combination, density)
            parameter.add_(combined)
            group = "experts" if combined.dim() == 3 else "others"
            parts = combined.flatten(1).any(1) if combined.dim() == 3 else combined.any().view(1)
            done, all_of = changed[group]
            changed[group] = (done + int(parts.sum()), all_of + len(parts))
        model: PreTrainedModel = adapted.unload()
    distance = None if expected is None else difference(expected, exact_logits(model, probe))
    return Merged(model, distance, changed)


def _logits_with_all(adapted: Any, names: list[str], weights: list[float], probe: Tensor) -> Tensor:
    """What peft computes with all adapters active, each scaled by its weight."""
    layers = [module for module in adapted.modules() if hasattr(module, "get_delta_weight")]
    for layer in layers:
        for name, weight in zip(names, weights, strict=True):
            layer.scaling[name] *= weight
    adapted.base_model.set_adapter(names)
    logits = exact_logits(adapted, probe)
    for layer in layers:
        for name, weight in zip(names, weights, strict=True):
            layer.scaling[name] /= weight
    return logits


def _deltas(adapted: Any, names: list[str]) -> Any:
    """(base parameter, delta of each adapter) of every adapted matrix."""
    for module in adapted.modules():
        if hasattr(module, "get_delta_weight"):
            parameter = module.get_param() if hasattr(module, "get_param") else module.get_base_layer().weight
            yield parameter, [module.get_delta_weight(name) for name in names]


def _combine(deltas: list[Tensor], weights: list[float], combination: str, density: float) -> Tensor:
    scale = torch.tensor(weights)
    if combination == "linear":
        return torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)]).sum(0)
    if deltas[0].dim() == 3:  # an expert by itself, so that a quiet one is not pruned away by its neighbours
        return torch.stack([_combine(list(one), weights, combination, density) for one in zip(*deltas, strict=True)])
    methods = {"ties": merge_utils.ties, "dare_linear": merge_utils.dare_linear, "dare_ties": merge_utils.dare_ties}
    combined: Tensor = methods[combination](deltas, scale, density)
    return combined
