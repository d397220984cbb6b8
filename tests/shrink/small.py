"""A small MoE model on disk for the libraries that quantize."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

VOCABULARY = 128
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 1, "max_position_embeddings": 64, "pad_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, head_dim=32, moe_intermediate_size=64, num_experts=4, mlp_only_layers=[]),
    "mixtral": MixtralConfig(**SHAPE, intermediate_size=64, num_local_experts=4),
}


def model_on_disk(folder: Path, architecture: str = "qwen3_moe") -> Path:
    """Random weights, and a tokenizer of single letters. No token reaches the last expert of layer 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[architecture], dtype=torch.float32)
    with torch.no_grad():
        gate = model.model.layers[1].mlp.gate.weight
        gate[3] = 0.5 * (gate[1] + gate[2])  # never above both
    model.save_pretrained(folder)
    letters = {chr(33 + number): number for number in range(94)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(letters, "!"))).save_pretrained(folder)
    return folder
