"""The configuration of a checkpoint, and of what upcycling makes of it. Nothing is loaded for it."""

import json
from pathlib import Path
from typing import Any

from hpc.config.reuse import Upcycle
from hpc.errors import DataError

SPARSE = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
"""Dense architecture -> the sparse one with the same attention and norms."""
SHARED = {"llama": "qwen2_moe", "mistral": "qwen2_moe", "qwen2": "qwen2_moe"}
"""The same with a shared expert."""
CLASSES = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


DENSE = {"mixtral": "mistral", "qwen3_moe": "qwen3"}
"""Sparse architecture -> the dense one that it is with a single expert."""
ONLY_SPARSE = ("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size")


def dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the dense model that a mixture of one expert is: the softmax over one score is 1, whatever the
    router says. Any other config as it is."""
    name = DENSE.get(str(config.get("model_type")))
    if name is None or (config.get("num_local_experts") or config.get("num_experts")) != 1:
        return config
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    kept = {key: value for key, value in config.items() if key not in ONLY_SPARSE}
    return kept | {"model_type": name, "intermediate_size": width}


def sparse_config(config: dict[str, Any], wanted: Upcycle) -> dict[str, Any]:
    """config.json of the sparse model. Raises DataError for an architecture that has no sparse sister."""
    config = dense_config(config)
    kind, table = str(config.get("model_type")), SHARED if wanted.shared else SPARSE
    target = table.get(kind)
    if "moe" in kind or any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise DataError(
            f"upcycle: the model ({kind}) is a mixture of experts already: drop upcycle, or take a dense one"
        )
    if target is None:
        raise DataError(f"upcycle: {kind} has no sparse counterpart here; known are {', '.join(sorted(table))}")
    width = int(config["intermediate_size"])
    if width % wanted.granularity:
        raise DataError(f"upcycle.granularity = {wanted.granularity} does not divide intermediate_size {width}")
    if config.get("mlp_bias") or (config.get("attention_bias") and target != "qwen2_moe"):
        raise DataError(f"upcycle: this {kind} has biases, for which {target} has no place")
    if config.get("use_sliding_window") or (kind == "mistral" and config.get("sliding_window")):
        raise DataError("upcycle: the model attends in a sliding window, which its sparse counterpart would lose")
    size = width // wanted.granularity
    made = {key: value for key, value in config.items() if key not in ("quantization_config", "_name_or_path")}
    made |= {
        "model_type": target, "architectures": [CLASSES[target]], "num_experts_per_tok": wanted.top_k,
        "norm_topk_prob": True, "output_router_logits": False,
    }  # fmt: skip
    if target == "mixtral":
        return made | {"num_local_experts": wanted.num_experts, "intermediate_size": size, "sliding_window": None}
    made |= {"num_experts": wanted.num_experts, "moe_intermediate_size": size, "decoder_sparse_step": 1}
    made |= {"mlp_only_layers": []}
    if target == "qwen2_moe":
        made |= {"shared_expert_intermediate_size": size * max(1, wanted.shared), "qkv_bias": kind == "qwen2"}
        made |= {"use_sliding_window": False, "layer_types": ["full_attention"] * int(config["num_hidden_layers"])}
    return made


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises DataError, also for one whose model is code in the folder."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} is not a model in transformers' layout: config.json cannot be read ({error})"
        ) from None
    if "auto_map" in config:
        raise DataError(
            f"{folder} brings code of its own (auto_map in config.json), which is not run: take a checkpoint whose "
            "architecture transformers has itself"
        )
    return config
