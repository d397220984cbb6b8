"""The door to peft: LoRA (arXiv:2106.09685) on attention and on fused three-dimensional experts, and merging it."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from hpc.config import AdapterTraining
from hpc.errors import ArtifactError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DENSE = ["gate_proj", "up_proj", "down_proj"]
"""Feed-forward matrices of a model without experts."""


def attach(model: PreTrainedModel, settings: AdapterTraining, seed: int) -> PeftModel:
    """Freeze the model and add adapters that change nothing yet (B = 0). Raises ArtifactError if a target is absent."""
    torch.manual_seed(seed)
    has_experts = any(".experts." in name for name, _ in model.named_parameters())
    feed_forward = DENSE if settings.experts and not has_experts else []
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=[*(ATTENTION if settings.attention else []), *feed_forward],
        target_parameters=EXPERTS if settings.experts and has_experts else None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    for wanted, part in ((settings.attention, "self_attn"), (settings.experts, "experts" if has_experts else ".mlp.")):
        if wanted and not any(part in name for name in trained):
            raise ArtifactError(f"no adapter could be attached to {part}: the model's architecture has other names")
    assert isinstance(adapted, PeftModel)
    return adapted


def base_name(name: str) -> str | None:
    """The name that a parameter of an adapted model has in its base; None for an adapter's own."""
    if ".lora_" in name:
        return None
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def trainable_parameters(model: torch.nn.Module) -> int:
    """Parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def save_adapter(model: Any, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors; peft loads them on the base model."""
    model.save_pretrained(str(folder))


def merge(base: PreTrainedModel, adapter: Path, probe: torch.Tensor) -> tuple[PreTrainedModel, float]:
    """Fold an adapter into the base weights, in fp32.

    Returns the merged model and the largest difference of logits between it and base + adapter on the ids `probe`
    (B, S). Raises ArtifactError when merging left the weights as they were.
    """
    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.no_grad():
        expected = adapted(input_ids=probe).logits
        with adapted.disable_adapter():
            unadapted = adapted(input_ids=probe).logits
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
        difference = float((merged.eval()(input_ids=probe).logits - expected).abs().max())
    if torch.equal(unadapted, expected):
        raise ArtifactError(f"the adapter in {adapter} does not change the model: it was not trained, or not loaded")
    return merged, difference
