"""Adapters on a frozen model: peft's on attention and dense layers, ours on experts; written and merged as peft's.

The door to peft. Its own adapters on fused experts make the experts' whole delta in every pass, and do not know expert
parallelism; those of hpc/model/adapters.py compute the same from activations. On disk both are
peft's `target_parameters`.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hpc.config import AdapterTraining, ExpertChoice
from hpc.errors import ArtifactError, ConfigError
from hpc.model.adapters import PLACE, Beside, ExpertAdapters, LowRank, first_A
from hpc.model.routing import PASSPORT

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
"""Matrices of attention blocks; those of DeepSeek's latent attention go down to the latent vectors (a) and up (b)."""
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DENSE = ["gate_proj", "up_proj", "down_proj"]
"""Feed-forward matrices of a model without experts."""


Chosen = Mapping[int, list[int]]
"""Layer -> experts that are adapted."""


def attach(
    model: PreTrainedModel, settings: AdapterTraining, seed: int, rank: int = 0, chosen: Chosen | None = None
) -> nn.Module:
    """Freeze the model and add adapters that change nothing yet (B = 0), in place. Raises ArtifactError if a target is
    absent.

    rank: of this process; under expert parallelism it holds the adapters of its own experts. chosen: the experts that
    are adapted, None for all.
    """
    torch.manual_seed(seed)
    blocks = _expert_blocks(model)
    targets = [*(ATTENTION if settings.attention else []), *(DENSE if settings.experts and not blocks else [])]
    model.requires_grad_(False)
    if targets:
        inject_adapter_in_model(_config(settings, targets, has_experts=False), model)
    if settings.experts and blocks:
        for name, layer, experts in blocks:
            adapted = None if chosen is None else chosen.get(int(name.rsplit(".", 1)[-1]), [])
            layer.add_module(PLACE, _beside(name, experts, settings, seed, rank, adapted))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    feed_forward = ".experts." if blocks else ".mlp."
    for wanted, part in ((settings.attention, ".self_attn."), (settings.experts, feed_forward)):
        if wanted and not any(part in name for name in trained):
            raise ArtifactError(f"no adapter could be attached to {part}: the model's architecture has other names")
    return model


def _config(settings: AdapterTraining, targets: list[str], *, has_experts: bool) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        target_parameters=EXPERTS if settings.experts and has_experts else None,
        task_type="CAUSAL_LM",
    )


def choose_experts(choice: ExpertChoice, base: Path, num_experts: int) -> Chosen:
    """Layer -> experts to adapt, by name or by the passport of the base. Raises ArtifactError or ConfigError."""
    if choice.named is not None:
        for layer, experts in choice.named.items():
            if beyond := [expert for expert in experts if expert >= num_experts]:
                raise ConfigError(f"expert_choice.named.{layer} has expert {beyond[0]} of {num_experts}: count from 0")
        return dict(choice.named)
    assert choice.top_loaded is not None
    try:
        loads = json.loads((base / PASSPORT).read_text(encoding="utf-8"))["assignments"]
    except (OSError, ValueError, KeyError):
        raise ArtifactError(
            f"expert_choice.top_loaded needs the router passport of the base, and {base} has none: take named experts, "
            "or a base that was trained here"
        ) from None
    count = max(1, round(choice.top_loaded * num_experts))
    return {
        layer: sorted(sorted(range(len(load)), key=lambda expert: -load[expert])[:count])
        for layer, load in enumerate(loads)
    }


def _expert_blocks(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """(name, decoder layer, fused experts) of every layer that has experts."""
    found = []
    for name, layer in model.named_modules():
        experts: Any = getattr(getattr(layer, "mlp", None), "experts", None)
        if isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter):
            found.append((name, layer, experts))
    return found


def _beside(
    name: str, experts: Any, settings: AdapterTraining, seed: int, rank: int, adapted: list[int] | None
) -> Beside:
    """Adapters of the experts of one layer that this rank holds; they start alike in every layout."""
    size = settings.parallel.expert_parallel_size
    made = []
    for part, weight in (("gate_up", experts.gate_up_proj), ("down", experts.down_proj)):
        num_experts, out_features, width = weight.shape
        start = first_A(num_experts, settings.rank, width, zlib.crc32(f"{seed} {name} {part}".encode()))
        own = start.chunk(size)[rank % size].clone()
        mask = None
        if adapted is not None:
            mask = torch.zeros(num_experts).index_fill_(0, torch.tensor(adapted, dtype=torch.long), 1.0)
            mask = mask.chunk(size)[rank % size]
        adapter = LowRank(own, out_features, settings.alpha / settings.rank, mask)
        if size > 1:
            for parameter in adapter.parameters():
                mark: Any = parameter  # what DeepSpeed knows an expert's parameter by
                mark.allreduce, mark.group_name = False, f"ep_size_{size}"
                mark.ds_zero_placement_family, mark.ds_zero_partition_group_name = "autoep_expert", mark.group_name
        made.append(adapter)
    return Beside(ExpertAdapters(*made))


def train_unadapted(model: nn.Module) -> None:
    """Train what has no adapter as well: embeddings, head, routers, norms. Matrices with an adapter stay frozen."""
    for name, parameter in model.named_parameters():
        if ".base_layer." not in name and not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            parameter.requires_grad_(True)


def base_name(name: str) -> str | None:
    """The name that a parameter of an adapted model has in its base; None for an adapter's own."""
    if ".lora_" in name or f".{PLACE}." in name:
        return None
    return name.replace(".base_layer", "")


def trainable_parameters(model: nn.Module, expert_parallel_size: int) -> int:
    """Parameters that training changes, over all ranks: after `attach` one holds the adapters of its own experts."""
    return sum(
        parameter.numel() * (expert_parallel_size if f".{PLACE}." in name else 1)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def save_adapter(state: Mapping[str, Tensor], settings: AdapterTraining, folder: Path, *, has_experts: bool) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which peft loads on the base model.

    state: the adapters' weights by their names here, with all experts.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_" in name:
            tensors[f"base_model.model.{name.replace('.default', '')}"] = value
        elif f".{PLACE}." in name:
            layer, _, rest = name.partition(f".{PLACE}.experts.")
            part, matrix = rest.split(".")
            # peft wraps one parameter after the other: the first is the inner one
            wrapper = "mlp.experts.base_layer" if part == "gate_up" else "mlp.experts"
            flat = value.flatten(0, 1) if matrix == "A" else value.permute(1, 2, 0).flatten(1)
            tensors[f"base_model.model.{layer}.{wrapper}.lora_{matrix}.weight"] = flat
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    targets = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in state if ".lora_" in name}
    config = _config(settings, sorted(targets), has_experts=has_experts)
    config.inference_mode = True
    config.save_pretrained(str(folder))
