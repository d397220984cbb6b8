"""config.json of models that many start from, from the catalogue of shapes: plans and rehearsals need no download.

Only what is a fact about the shape is in it. What a checkpoint holds is read from the checkpoint when it is here.
"""

import re
from typing import Any

from hpc.plan.catalogue import SHAPES, plain_name

FAMILIES = {
    "mixtral": ("mixtral", 32768),
    "olmoe": ("olmoe", 4096),
    "qwen3": ("qwen3", 32768),
    "qwen25": ("qwen2", 32768),
    "mistral": ("mistral", 32768),
    "tinyllama": ("llama", 2048),
    "llama2": ("llama", 4096),
    "llama3": ("llama", 8192),
}
"""Beginning of a name in the catalogue -> transformers model type, and the context that its first release has at least
(from memory of their config.json)."""
RENORMALIZED = ("mixtral", "qwen3_moe")
"""Architectures whose released models let the chosen experts' weights add up to one; OLMoE's do not."""


def hub_config(source: str) -> dict[str, Any] | None:
    """config.json of a Hub id such as `mistralai/Mixtral-8x7B-v0.1`; None for one that the catalogue does not know."""
    name = re.sub(r"-\d{4}$", "", source.rstrip("/").split("/")[-1])
    plain = plain_name(name)
    family = next((known for prefix, known in FAMILIES.items() if plain.startswith(prefix)), None)
    shape = SHAPES.get(plain)
    if shape is None or family is None or shape.shared_size:
        return None
    kind, context = family
    config: dict[str, Any] = {
        "hidden_size": shape.hidden, "num_hidden_layers": shape.attention_layers, "head_dim": shape.head_dim,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
        "max_position_embeddings": context, "tie_word_embeddings": shape.tied,
    }  # fmt: skip
    if not shape.moe_layers:
        return config | {"model_type": kind, "intermediate_size": shape.dense_size}
    kind = "qwen3_moe" if kind == "qwen3" else kind
    experts = {"num_local_experts" if kind == "mixtral" else "num_experts": shape.experts}
    width = {"moe_intermediate_size": shape.expert_size} if kind == "qwen3_moe" else {}
    chosen = {"num_experts_per_tok": shape.top_k, "norm_topk_prob": kind in RENORMALIZED}
    return config | experts | width | chosen | {"model_type": kind, "intermediate_size": shape.expert_size}
