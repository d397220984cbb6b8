"""transformers models from a configuration or from disk. The door to transformers' model classes."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging

from hpc.config import Model, Router
from hpc.errors import ArtifactError, DataError
from hpc.model.census import verify_model

logging.set_verbosity_error()
logging.disable_progress_bar()


def model_config(model: Model, router: Router, vocab_size: int, seq_len: int, end_of_text_id: int) -> PretrainedConfig:
    """The transformers configuration of a model described by ours. Embedding and head are not tied."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.expert_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": True,
        "max_position_embeddings": seq_len,
        "rope_theta": model.rope_theta,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": end_of_text_id,
        "pad_token_id": None,
    }
    if model.architecture == "olmoe":
        return OlmoeConfig(**{**common, "norm_topk_prob": False}, num_experts=router.num_experts)  # as OLMoE-1B-7B
    if model.architecture == "mixtral":
        return MixtralConfig(**common, num_local_experts=router.num_experts, sliding_window=None)
    if model.architecture == "deepseek_v3":
        return _deepseek_v3(common, model, router)
    shape: dict[str, Any] = {"head_dim": model.head_dim, "moe_intermediate_size": model.expert_size}
    return Qwen3MoeConfig(**common, **shape, num_experts=router.num_experts, decoder_sparse_step=1, mlp_only_layers=[])


def _deepseek_v3(common: dict[str, Any], model: Model, router: Router) -> PretrainedConfig:
    latent = model.latent
    return DeepseekV3Config(
        **{**common, "intermediate_size": model.dense_width(router), "num_key_value_heads": model.num_attention_heads},
        moe_intermediate_size=model.expert_size,
        n_routed_experts=router.num_experts,
        n_shared_experts=router.num_shared_experts,
        n_group=router.num_groups,
        topk_group=router.top_groups,
        routed_scaling_factor=router.scaling_factor,
        first_k_dense_replace=model.num_dense_layers,
        q_lora_rank=latent.query_rank,
        kv_lora_rank=latent.kv_rank,
        qk_nope_head_dim=latent.nope_head_dim,
        qk_rope_head_dim=latent.rope_head_dim,
        v_head_dim=latent.value_head_dim,
        num_mtp_layers=0,
    )


RESIDUAL_WRITERS = (".o_proj.weight", ".down_proj.weight", ".experts.down_proj")
"""Ends of the names of matrices whose output is added to the residual stream."""


def build_model(config: PretrainedConfig, seed: int, initialization: str = "normal") -> PreTrainedModel:
    """A model with random fp32 weights that depend on `seed` alone; `initialization` as in Model.initialization."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if initialization == "depth_scaled":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(RESIDUAL_WRITERS):
                    parameter.mul_((2 * int(config.num_hidden_layers)) ** -0.5)
    return model


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model in fp32 whose weights are about to be filled in: memory is reserved and not touched."""
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


def hollow_model(config: PretrainedConfig) -> PreTrainedModel:
    """The decoder of a model, without head and without weights (on torch's `meta` device); what is computed from the
    configuration, such as rotary frequencies, is there."""
    with torch.device("meta"):
        base: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model
    base.rotary_emb = type(base.rotary_emb)(config)
    return base


def config_from(content: dict[str, Any]) -> PretrainedConfig:
    """The transformers configuration that a config.json with this content would be read as."""
    rest = {key: value for key, value in content.items() if key != "model_type"}
    config: PretrainedConfig = AutoConfig.for_model(content["model_type"], **rest)
    return config


def load_config(folder: Path) -> PretrainedConfig:
    """The transformers configuration of a folder. Code that a folder brings along is never run. Raises DataError for
    an architecture that transformers does not have."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise DataError(f"{folder}: config.json cannot be used ({reason}): take another model") from None
    return config


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a saved model. Raises ArtifactError when a tensor is missing or left over: none may stay random."""
    pair: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, info = pair
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            names = ", ".join(str(name) for name in list(info[problem])[:3])
            raise ArtifactError(f"{folder}: {len(info[problem])} {problem.replace('_', ' ')} while loading ({names})")
    loaded: PreTrainedModel = model
    return loaded


def save_model(config: PretrainedConfig, state: dict[str, torch.Tensor], folder: Path) -> dict[str, Any]:
    """Save weights as a plain transformers folder (safetensors); returns a census of the tensors written.

    `state` must name exactly the parameters of the architecture: strict loading proves that none is missing. The files
    are read back: raises ArtifactError when an expert in them is not the one in `state`.
    """
    model = empty_model(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    state = {name: tensor for name, tensor in state.items() if name not in tied}
    problems = model.load_state_dict(state, strict=False)
    missing = [name for name in problems.missing_keys if name not in tied]
    if missing or problems.unexpected_keys:
        raise ArtifactError(f"weights and configuration do not fit: {[*missing, *problems.unexpected_keys][0]}")
    model.save_pretrained(folder)
    digests = verify_model(folder, state)
    groups = census(state)
    if digests:
        groups["experts"]["xxh3_64_by_layer"] = digests
    return groups


FEED_FORWARD = "shared experts and dense layers"
"""The group of feed-forward matrices that every token uses."""


def census(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors and parameters by group: experts, router, attention, embedding and head, norms."""
    groups: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        group = tensor_group(name)
        entry = groups.setdefault(group, {"tensors": 0, "parameters": 0})
        entry["tensors"] += 1
        entry["parameters"] += tensor.numel()
    return groups


def tensor_group(name: str) -> str:
    """Which part of the model a parameter belongs to, from its transformers name."""
    if ".experts." in name:
        return "experts"
    if ".shared_expert" in name or ".mlp.down_proj" in name or ".mlp.up_proj" in name or ".mlp.gate_proj" in name:
        return FEED_FORWARD
    if ".mlp.gate." in name:
        return "router"
    if "norm" in name:
        return "norms"
    return "attention" if ".self_attn." in name else "embedding and head"
