"""What is known about a model that exists, from its config.json: shape, parameters, context."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc.config import Init, Model, Reuse, Router, RunConfig, Stage
from hpc.errors import DataError
from hpc.plan.hub import hub_config
from hpc.plan.params import Parameters, count
from hpc.reuse.fetch import SOURCES, locate
from hpc.reuse.shape import read_config, sparse_config

SPARSE = {"mixtral": "mixtral", "olmoe": "olmoe", "qwen3_moe": "qwen3_moe", "deepseek_v3": "deepseek_v3"}
DENSE = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "mixtral", "qwen3": "qwen3_moe", "qwen2_moe": "mixtral"}
"""transformers model type -> the architecture whose attention and norms have as many parameters, biases apart."""


def reused_config(config: RunConfig, stage: Reuse, earlier: dict[str, Any] | None) -> dict[str, Any] | None:
    """config.json of what a reuse stage makes; None where it is neither here nor in the catalogue, or is a .gguf file.

    earlier: config.json of the stage that it needs, where it needs one.
    """
    done = Path(config.run_root) / config.name / "stages" / stage.name / "artifact"
    try:
        if (done / "config.json").is_file():
            return read_config(done)
        if stage.init is not None:
            earlier = source_config(stage.init, config.run_root)[0]
        if earlier is None:
            return None
        return sparse_config(earlier, stage.upcycle) if stage.upcycle else earlier
    except DataError:
        return None  # the stage will say what is wrong


def pretrained_config(model: Model, router: Router, vocab_size: int, seq_len: int) -> dict[str, Any]:
    """config.json of what a pretrain stage makes, as far as shapes are read from it: it may be upcycled later."""
    return {
        "model_type": model.architecture, "hidden_size": model.hidden_size, "intermediate_size": model.expert_size,
        "num_local_experts": router.num_experts, "num_experts_per_tok": router.top_k, "head_dim": model.head_dim,
        "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads, "vocab_size": vocab_size, "max_position_embeddings": seq_len,
    }  # fmt: skip


def source_config(init: Init, run_root: str) -> tuple[dict[str, Any] | None, bool]:
    """config.json of a checkpoint, and whether it is the catalogue's, the checkpoint itself being elsewhere.

    None for a .gguf file, and for what is neither here nor known. Raises DataError for one that cannot be read.
    """
    path = locate(init, Path(run_root).absolute() / SOURCES)
    if path is None:
        found = hub_config(init.source)
        return found, found is not None
    return (read_config(path), False) if path.is_dir() else (None, False)


def catalogue_note(config: RunConfig, stage: Stage) -> tuple[str, ...]:
    """What a plan says about a model whose shape is known while its checkpoint is elsewhere."""
    if not isinstance(stage, Reuse) or stage.init is None:
        return ()
    try:
        _, is_catalogued = source_config(stage.init, config.run_root)
    except DataError:
        return ()
    return (f"shape from the catalogue: {stage.init.source} is not on this machine",) if is_catalogued else ()


def shape_of(config: dict[str, Any]) -> tuple[Model, Router, Parameters, int, int] | None:
    """Shape, router, parameters, vocabulary and context of a config.json; None for an architecture without formulas."""
    kind = str(config.get("model_type"))
    if kind not in SPARSE and kind not in DENSE:
        return None
    num_experts = int(
        next((config[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(k)), 1)
    )
    size = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    if kind == "deepseek_v3" or int(config.get("head_dim") or hidden // heads) * heads != hidden:
        return None  # widths that our Model does not describe
    shape = Model.model_validate(
        {"architecture": SPARSE.get(kind) or DENSE[kind], "hidden_size": hidden, "expert_size": size,
         "num_layers": config["num_hidden_layers"], "num_attention_heads": heads,
         "num_key_value_heads": config.get("num_key_value_heads") or heads}
    )  # fmt: skip
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    top_k = int(config.get("num_experts_per_tok") or 1)
    router = Router(num_experts=num_experts, top_k=top_k, num_shared_experts=shared // size)
    vocabulary = int(config["vocab_size"])
    parameters = count(shape, router, vocabulary)
    if num_experts == 1:
        parameters = replace(parameters, router=0)
    if shared:
        parameters = replace(parameters, always=shape.num_layers * 3 * hidden * shared)
    if config.get("tie_word_embeddings"):
        parameters = replace(parameters, embedding=0)
    return shape, router, parameters, vocabulary, int(config.get("max_position_embeddings") or 0)
