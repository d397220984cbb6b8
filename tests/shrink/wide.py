"""Tiny random models of every architecture that is exported, with a tokenizer of ours: rows of 256 for all types."""

import pydoc_data.topics
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hpc.data.tokenizer import copy_tokenizer, train_tokenizer

VOCAB = 400
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "rope_theta": 5000.0,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
ALL_SPARSE: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
LATENT: dict[str, Any] = {
    "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1, "q_lora_rank": 64, "kv_lora_rank": 256, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 64, "norm_topk_prob": True, "num_mtp_layers": 0,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=64),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SHAPE, **ALL_SPARSE, moe_intermediate_size=256, num_experts=4,
                                        shared_expert_intermediate_size=256, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SHAPE, **ALL_SPARSE, moe_intermediate_size=256, num_experts=8, head_dim=64,
                                        num_experts_per_tok=2, norm_topk_prob=True),
    "olmoe": lambda: OlmoeConfig(**{**SHAPE, "num_key_value_heads": 4}, num_experts=8, num_experts_per_tok=2),
    "deepseek_v3": lambda: DeepseekV3Config(**{**SHAPE, "num_key_value_heads": 4}, **LATENT, moe_intermediate_size=256,
                                            num_experts_per_tok=2),
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save(kind: str, folder: Path, tokenizer: Path) -> Any:
    """A random model with its tokenizer and a chat template as a transformers folder; returns the model."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return model


def tokenizer_in(folder: Path) -> Path:
    """Train the tokenizer that the models have."""
    train_tokenizer((str(text) for text in list(pydoc_data.topics.topics.values())[:20]), VOCAB, folder)
    return folder


@cache
def some_ids() -> list[int]:
    """More ids than llama.cpp gives logits of at once."""
    return [int(n) for n in torch.randint(1, VOCAB, (150,), generator=torch.Generator().manual_seed(0))]


def kl(wanted: Any, found: Any) -> float:
    """Mean KL divergence of logits (S, V), nats per position."""
    first, second = (torch.as_tensor(one).double().log_softmax(-1) for one in (wanted, found))
    return float((first.exp() * (first - second)).sum(-1).mean())


def logits_of(model: Any, ids: list[int]) -> Any:
    """transformers' logits (S, V)."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]
