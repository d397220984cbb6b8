"""The shape of a model from its config.json as transformers writes it: what decides bytes, cache and reads."""

from typing import Any

from hpc.errors import DataError
from hpc.plan.shapes import Shape

GATED = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmo2", "olmo3", "olmoe", "deepseek_v2",
    "deepseek_v3", "gpt_oss", "granite", "granitemoe", "smollm3", "glm4_moe",
)  # fmt: skip
"""Model types whose layers are attention and SwiGLU, dense or of experts, and nothing else."""


def of_config(config: dict[str, Any], place: str) -> tuple[Shape, int | None]:
    """Shape, and the longest context that the model was made for. Raises DataError; `place` names the file."""
    kind = str(config.get("model_type"))
    if kind not in GATED:
        raise DataError(f"{place}: model_type {kind!r} is not known here; known are {', '.join(GATED)}")
    try:
        return _shape(kind, config), int(config.get("max_position_embeddings") or 0) or None
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"{place} is no whole configuration of a {kind} model ({error!r}): fetch it again") from None


def _shape(kind: str, config: dict[str, Any]) -> Shape:
    layers, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
    heads = int(config["num_attention_heads"])
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
    width = int(config["intermediate_size"])
    size = _first(config, "moe_intermediate_size") or width
    shared = _first(config, "shared_expert_intermediate_size") or size * _first(config, "n_shared_experts")
    dense = _dense_layers(config, layers) if experts else layers
    latent = kind.startswith("deepseek")
    nope = _first(config, "qk_nope_head_dim")
    rope = _first(config, "qk_rope_head_dim") if latent else 0
    window = _first(config, "sliding_window")
    windowed = _windowed(kind, config, layers) if window else 0
    return Shape(
        hidden=hidden, vocab=int(config["vocab_size"]), attention_layers=layers, heads=heads,
        kv_heads=_first(config, "num_key_value_heads") or heads,
        head_dim=nope + rope if latent else _first(config, "head_dim") or hidden // heads,
        value_dim=_first(config, "v_head_dim") or None if latent else None,
        query_rank=_first(config, "q_lora_rank") if latent else 0,
        kv_rank=_first(config, "kv_lora_rank") if latent else 0, rope_dim=rope,
        windowed_layers=windowed, window=window if windowed else 0,
        dense_layers=dense, dense_size=width if dense else 0, moe_layers=layers - dense, experts=experts or 1,
        top_k=_first(config, "num_experts_per_tok", "num_experts_per_token") or 1,
        expert_size=size if experts else 0, shared_size=shared if experts else 0,
        tied=bool(config.get("tie_word_embeddings")),
    )  # fmt: skip


def _first(config: dict[str, Any], *keys: str) -> int:
    """The first of some keys that has a value, 0 without any."""
    return next((int(config[key]) for key in keys if config.get(key)), 0)


def _dense_layers(config: dict[str, Any], layers: int) -> int:
    """Layers without experts: DeepSeek counts the first ones, Qwen lists them and can take every second."""
    listed = {int(layer) for layer in config.get("mlp_only_layers") or []}
    step = _first(config, "decoder_sparse_step") or 1
    plain = {layer for layer in range(layers) if (layer + 1) % step}
    return max(_first(config, "first_k_dense_replace"), len(listed | plain))


def _windowed(kind: str, config: dict[str, Any], layers: int) -> int:
    """Layers that attend in a sliding window."""
    listed = config.get("layer_types")
    if listed:
        return sum(item == "sliding_attention" for item in listed)
    if kind.startswith("qwen"):
        first = config.get("max_window_layers")
        return layers - int(first or 0) if config.get("use_sliding_window") else 0
    return layers
