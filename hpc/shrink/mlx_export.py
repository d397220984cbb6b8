"""From a transformers folder to one that mlx-lm reads as it is: weights, configuration, tokenizer, chat template.

Round-to-nearest per group of weights. Where mlx-lm does not find a setting in a configuration it takes a default of its
own and says nothing: another rope_theta still answers in good English. So the exported config.json spells all of them
out under the names that mlx-lm reads, and what its model cannot do is refused here with the setting it ignores.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.data.tokenizer import FILES
from hpc.errors import ArtifactError, ConfigError, DataError
from hpc.model.build import load_config
from hpc.runtimes.child import end_with_parent, environment
from hpc.runtimes.mlx_runner import require
from hpc.shrink.mlx_convert import GROUP_SIZES, Conversion
from hpc.shrink.mlx_folder import census


@dataclass(frozen=True)
class MlxType:
    """How the weights of an MLX folder are kept."""

    bits: int | None = None
    """Of a weight, scale and offset not counted; None leaves all weights in `dtype`."""
    recipe: str | None = None
    """mlx-lm's mixture: more bits for the head and for value and down projections of every third layer."""
    dtype: str | None = None
    """Of what is not quantized; None lets the caller choose."""


MLX_TYPES = {
    "f32": MlxType(dtype="float32"),
    "f16": MlxType(dtype="float16"),
    "bf16": MlxType(dtype="bfloat16"),
    **{f"{bits}bit": MlxType(bits) for bits in (8, 6, 5, 4, 3, 2)},
    **{f"mixed_{low}_{high}": MlxType(low, f"mixed_{low}_{high}") for low, high in ((4, 6), (3, 6), (3, 4), (2, 6))},
}
"""What `export` can be asked for, by the names mlx-lm's users know."""

BITS = (2, 3, 4, 5, 6, 8, 16)
"""What a module can be asked to have; 16 leaves it unquantized."""

ASSUMED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"attention_bias": False},
    "mixtral": {},
    "olmoe": {"clip_qkv": None},
    "qwen2_moe": {
        "norm_topk_prob": False, "qkv_bias": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {"attention_bias": False},
    "deepseek_v3": {"rope_interleave": True, "tie_word_embeddings": False},
}  # fmt: skip
"""Architecture -> settings that mlx-lm's model does not read, with the value it computes with. Read from its source."""

STRETCHED = ("linear", "llama3", "yarn")
"""Ways to stretch positions that mlx-lm and transformers were measured to agree on."""
UNSTRETCHED = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Architectures whose positions mlx-lm's model does not stretch."""


def export(
    source: Path,
    out: Path,
    quantization: str,
    scratch: Path,
    *,
    group_size: int = 64,
    dtype: str = "bfloat16",
    bits_by_module: Mapping[str, int] | None = None,
) -> None:
    """Write `source` (a transformers folder) as a new MLX folder `out`, which appears complete or not at all.

    quantization: a name of MLX_TYPES. group_size: weights that share a scale and an offset of `dtype`: 4 bits and
    groups of 64 make 4.5 bits a weight. bits_by_module: transformers' name of a module -> bits (16: not quantized) that
    it gets instead; MLX keeps one width for all experts of a matrix of a layer, `model.layers.0.mlp.experts.down_proj`.
    Routers are never quantized. scratch: a folder next to `out` to work in.

    Raises ConfigError for a format or group size that cannot be, DataError for a model that mlx-lm cannot run as it is,
    ArtifactError when mlx-lm fails or leaves an expert unquantized.
    """
    require()
    kind, module_bits = MLX_TYPES.get(quantization), dict(bits_by_module or {})
    if kind is None:
        raise ConfigError(f"{quantization!r} is no MLX format: choose one of {', '.join(MLX_TYPES)}")
    _check_modules(kind, quantization, module_bits)
    config = mlx_config(source)
    if kind.bits is not None:
        _check_groups(config, group_size)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    wanted = Conversion(
        str(source), str(scratch), config, kind.dtype or dtype, kind.bits, kind.recipe, group_size, module_bits
    )
    _in_fresh_process(wanted, quantization)
    for name in (*FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, scratch / name)
    if kind.bits is not None:
        _check_experts(scratch, [name for name, bits in module_bits.items() if bits == 16])
    for path in scratch.iterdir():
        path.chmod(0o644)
    scratch.rename(out)


def mlx_config(source: Path) -> dict[str, Any]:
    """The config.json for mlx-lm: all that transformers' configuration says, also under the names of its version 4.

    Raises DataError, naming the setting, for a model that mlx-lm would compute in another way.
    """
    loaded = load_config(source)
    kind, asked = str(loaded.model_type), loaded.to_dict()
    if kind not in ASSUMED:
        raise DataError(f"{source}: {kind} is not exported to MLX, known are {', '.join(ASSUMED)}: take another format")
    if asked.get("quantization_config"):
        raise DataError(f"{source} is quantized already: export the model it was made from")
    rope = dict(asked.get("rope_parameters") or {})
    heads = int(asked["num_attention_heads"])
    assumed: dict[str, Any] = {"hidden_act": "silu", **ASSUMED[kind]}
    if kind in ("mixtral", "qwen2_moe", "qwen2") and asked.get("head_dim"):
        assumed["head_dim"] = int(asked["hidden_size"]) // heads
    if kind == "deepseek_v3" and asked["num_experts_per_tok"] == 1:
        assumed["norm_topk_prob"] = False
    for key, value in assumed.items():
        found = asked.get(key)
        if found != value:
            raise DataError(
                f"{source}: mlx-lm's {kind} computes with {key} = {value}, this model has {found}: take another format"
            )
    stretch = rope.get("rope_type", "default")
    if stretch != "default" and (kind in UNSTRETCHED or stretch not in STRETCHED):
        raise DataError(f"{source}: rope_type = {stretch} is not exported to MLX for {kind}: take another format")
    window = asked.get("sliding_window") if asked.get("use_sliding_window", True) else None
    if window and window < asked["max_position_embeddings"]:
        raise DataError(f"{source}: attention in a window of {window} is not exported to MLX: take another format")
    if kind == "deepseek_v3" and int(asked["num_hidden_layers"]) > 61:
        raise DataError(f"{source}: mlx-lm's {kind} drops layers after the 61st: take another format")
    config = {**asked, "rope_theta": rope.get("rope_theta", 10000.0)}
    config["rope_scaling"] = None if stretch == "default" else rope
    if "num_local_experts" in asked:
        config["num_experts"] = asked["num_local_experts"]
    if kind == "deepseek_v3":
        config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    return config


def _check_modules(kind: MlxType, quantization: str, module_bits: dict[str, int]) -> None:
    if module_bits and kind.bits is None:
        raise ConfigError(f"bits_by_module has no effect on {quantization!r}, which quantizes nothing: leave it out")
    for name, bits in module_bits.items():
        if bits not in BITS:
            raise ConfigError(f"bits_by_module: {bits} bits for {name!r}; MLX knows {', '.join(map(str, BITS))}")


def _check_groups(config: dict[str, Any], group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"group_size {group_size} is none that MLX has: choose 32, 64 or 128")
    experts = config.get("moe_intermediate_size") or config["intermediate_size"]
    for setting, size in (("hidden_size", config["hidden_size"]), ("expert_size", experts)):
        if size % group_size:
            raise ConfigError(f"group_size {group_size} does not divide {setting} {size}: choose a smaller one")


def _in_fresh_process(wanted: Conversion, quantization: str) -> None:
    command = [sys.executable, "-m", "hpc.shrink.mlx_convert"]
    ended = subprocess.run(
        command, input=wanted.text(), capture_output=True, text=True, env=environment(), preexec_fn=end_with_parent
    )
    if ended.returncode:
        word = (ended.stderr.strip().splitlines() or ["no word"])[-1]
        kind, _, reason = word.partition(": ")
        if kind == ConfigError.__name__:
            raise ConfigError(reason)
        raise ArtifactError(f"mlx-lm could not make {quantization!r} of {wanted.source} ({word})")


def _check_experts(folder: Path, kept: list[str]) -> None:
    experts = census(folder).get("experts")
    if experts and not kept and experts["quantized_matrices"] != experts["matrices"]:
        raise ArtifactError(
            f"{experts['quantized_matrices']} of {experts['matrices']} matrices of experts were quantized: the "
            "artifact is refused"
        )
