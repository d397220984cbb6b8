"""The process that writes an MLX folder: `python -m hpc.shrink.mlx_convert`, with a `Conversion` as JSON on stdin.

A process of its own because mlx-lm registers classes with transformers and lowers limits of the process it is in.
Tensors are read lazily and written file by file, so memory follows the largest file (5 GiB), not the model.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc.errors import ConfigError

GROUP_SIZES = (128, 64, 32)
"""Weights that share a scale and an offset: what MLX has kernels for."""


@dataclass(frozen=True)
class Conversion:
    """What to make of a transformers folder."""

    source: str
    folder: str
    config: dict[str, Any]
    """The config.json to write."""
    dtype: str
    """Type of scales and of what is not quantized: float32, float16 or bfloat16."""
    bits: int | None
    """Bits of a weight; None leaves all in `dtype`."""
    recipe: str | None
    """mlx-lm's name of a mixture that replaces `bits`."""
    group_size: int
    bits_by_module: dict[str, int]
    """transformers' name of a module -> its bits, before `bits` and `recipe`; 16 leaves it in `dtype`."""

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


def transformers_name(name: str) -> str:
    """The name in a transformers model of this version; stacked experts have theirs without a number."""
    return name.replace(".block_sparse_moe.", ".mlp.").replace(".switch_mlp.", ".experts.")


def is_router(module: str) -> bool:
    """Whether a module (transformers' name) decides on experts: too small and too delicate to be quantized."""
    return module.endswith((".mlp.gate", ".shared_expert_gate"))


def convert(wanted: Conversion) -> None:
    """Write the folder's weights and config.json. Raises ConfigError for a module that the model does not have."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map_with_path
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model, save_config, save_model

    model, _ = load_model(Path(wanted.source), lazy=True, model_config=wanted.config)
    dtype = getattr(mx, wanted.dtype)
    keeps_type = getattr(model, "cast_predicate", lambda _: True)

    def cast(name: str, value: Any) -> Any:
        return value.astype(dtype) if keeps_type(name) and mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map_with_path(cast, model.parameters()))
    if wanted.config["model_type"] == "deepseek_v3":
        _raise_correction(model, mx)
    config = dict(wanted.config)
    if wanted.bits is not None:
        recipe = mixed_quant_predicate_builder(wanted.recipe, model, wanted.group_size) if wanted.recipe else None
        common = {"group_size": wanted.group_size, "bits": wanted.bits, "mode": "affine"}
        quantization: dict[str, Any] = dict(common)
        asked = set(wanted.bits_by_module)

        def choose(path: str, module: Any) -> dict[str, Any] | bool:
            name = transformers_name(path)
            if not hasattr(module, "to_quantized"):
                return False
            asked.discard(name)
            bits = recipe(path, module)["bits"] if recipe else wanted.bits
            bits = wanted.bits_by_module.get(name, 16 if is_router(name) else bits)
            sizes = (size for size in GROUP_SIZES if size <= wanted.group_size and not module.weight.shape[-1] % size)
            group_size = next(sizes, None)
            if bits == 16 or group_size is None:
                return False
            chosen = {"group_size": group_size, "bits": bits, "mode": "affine"}
            if chosen != common:
                quantization[path] = chosen
            return chosen

        nn.quantize(model, class_predicate=choose)
        if asked:
            raise ConfigError(f"bits_by_module names {sorted(asked)[0]!r}, which is no matrix of this model in MLX")
        config["quantization"] = quantization
    save_model(wanted.folder, model, donate_model=True)
    save_config(config, Path(wanted.folder) / "config.json")


def _raise_correction(model: Any, mx: Any) -> None:
    """Shift each layer's correction of router scores so that none is negative; the choice of experts stays the same.

    Experts of groups that were not chosen get 0 in mlx-lm and minus infinity in transformers: 0 must be the lowest.
    """
    for layer in model.layers:
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None:
            gate.e_score_correction_bias = gate.e_score_correction_bias - mx.min(gate.e_score_correction_bias)


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # mlx-lm does without, and starts in half the time
    try:
        convert(Conversion(**json.load(sys.stdin)))
    except (ConfigError, ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
