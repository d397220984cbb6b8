"""Tiny random models of every architecture, saved as transformers folders with a tokenizer and a chat template."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hpc.data.tokenizer import train_tokenizer

THETA = 30_000.0
"""Neither 1e4 nor 1e6, the defaults of the runtimes: a model read with one of them gives other logits."""

TEXT = "The people of the United States are one people; their house is not divided against itself. " * 20
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
COMMON: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": THETA, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "initializer_range": 0.08,
}  # fmt: skip
SPARSE: dict[str, Any] = {"num_experts_per_tok": 2, "num_experts": 8, "norm_topk_prob": True}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "olmoe": SPARSE,
    "qwen3_moe": {**SPARSE, "head_dim": 64, "moe_intermediate_size": 128, "mlp_only_layers": [0]},
    "qwen2_moe": {
        **SPARSE, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "norm_topk_prob": False,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4, "moe_intermediate_size": 128, "n_routed_experts": 8, "n_shared_experts": 1,
        "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 64,
        "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "num_mtp_layers": 0,
    },
    "llama": {"tie_word_embeddings": True, "head_dim": 64},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
}  # fmt: skip
"""What each architecture is asked for besides COMMON."""


def tiny_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A random model whose router weights and corrections are not those of a fresh one."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**COMMON, **KINDS[kind], **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name or name.endswith("bias"):
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model


@cache
def _tokenizer(folder: Path) -> Path:
    train_tokenizer([TEXT], int(COMMON["vocab_size"]), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A complete folder."""
    model.save_pretrained(folder)
    for path in _tokenizer(folder.parent / "tokenizer").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def ids_of(length: int) -> torch.Tensor:
    """Ids (1, length)."""
    return torch.randint(int(COMMON["vocab_size"]), (1, length), generator=torch.Generator().manual_seed(2))


def kl(source: PreTrainedModel, other: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean KL(source || other) in nats per token; other: logits (S, V)."""
    with torch.no_grad():
        p = source(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return float((p.exp() * (p - other.log_softmax(-1))).sum(-1).mean())
