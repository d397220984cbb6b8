"""A model folder in MLX's layout: safetensors under mlx-lm's names, experts of a layer stacked, quantized by groups.

A quantized matrix is three tensors: `weight`, rows of integers packed into 32-bit words, and per group of `group_size`
weights of a row a scale and an offset, `scales` and `biases`: w = scale * q + offset. config.json says how many bits.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from hpc.model.build import tensor_group
from hpc.runtimes.mlx_runner import require
from hpc.shrink.mlx_convert import transformers_name

Matrix = npt.NDArray[np.float32]


def census(folder: Path) -> dict[str, Any]:
    """By group of `tensor_group`: tensors, parameters, bytes, bits_per_weight (scales and offsets included),
    matrices (each expert's by itself) and how many of them are quantized. From the headers of the files."""
    quantization = _quantization(folder)
    groups: dict[str, dict[str, Any]] = {}
    shapes = _shapes(folder)
    for name, (dtype, shape) in shapes.items():
        module, part = name.rsplit(".", 1)
        packed = f"{module}.scales" in shapes and part != "bias"
        group = groups.setdefault(
            tensor_group(transformers_name(name)),
            {"tensors": 0, "parameters": 0, "bytes": 0, "matrices": 0, "quantized_matrices": 0},
        )
        group["tensors"] += 1
        group["bytes"] += int(np.prod(shape)) * BYTES[dtype]
        if packed and part != "weight":
            continue
        if packed:
            scales = shapes[f"{module}.scales"][1]
            size = quantization.get(module, quantization)["group_size"]
            group["parameters"] += int(np.prod(scales)) * size
        else:
            group["parameters"] += int(np.prod(shape))
        if part == "weight" and len(shape) > 1:
            matrices = shape[0] if ".switch_mlp." in name else 1
            group["matrices"] += matrices
            group["quantized_matrices"] += matrices if packed else 0
    for group in groups.values():
        group["bits_per_weight"] = 8 * group["bytes"] / group["parameters"]
    return groups


BYTES = {"F32": 4, "U32": 4, "F16": 2, "BF16": 2}
"""Size of an element by safetensors' name of its type."""


def matrices(folder: Path) -> Iterator[tuple[str, Matrix]]:
    """Every parameter in float32, dequantized by MLX, an expert's matrices by themselves, under transformers' names:
    `model.layers.0.mlp.experts.3.gate_proj.weight`. One file is in memory at a time."""
    require()
    import mlx.core

    mx: Any = mlx.core
    quantization = _quantization(folder)
    where = {name: path for path in _files(folder) for name in _header(path)}
    loaded: dict[Path, dict[str, Any]] = {}

    def read(name: str) -> Any:
        path = where[name]
        if path not in loaded:
            loaded.clear()
            loaded[path] = mx.load(str(path))
        return loaded[path][name]

    def parameter(name: str) -> Iterator[Matrix]:
        """Its matrices one by one where experts are stacked, else it alone."""
        module, part = name.rsplit(".", 1)
        tensors = [read(name)]
        if part == "weight" and f"{module}.scales" in where:
            tensors += [read(f"{module}.{other}").astype(mx.float32) for other in ("scales", "biases")]
        how = quantization.get(module, quantization)
        for one in zip(*tensors, strict=True) if ".switch_mlp." in name else [tensors]:
            whole = mx.dequantize(*one, how["group_size"], how["bits"]) if len(tensors) > 1 else one[0]
            yield np.array(whole.astype(mx.float32))

    for name in where:
        module, part = name.rsplit(".", 1)
        if f"{module}.scales" in where and part in ("scales", "biases"):
            continue
        if ".switch_mlp." in name:
            layer, matrix = transformers_name(name).split(".experts.")
            for expert, found in enumerate(parameter(name)):
                yield f"{layer}.experts.{expert}.{matrix}", found
        elif module.endswith(".unembed_out"):
            continue  # comes with its embed_q
        elif module.endswith(".embed_q"):
            keys = next(parameter(name)).swapaxes(-1, -2)
            values = next(parameter(name.replace(".embed_q.", ".unembed_out.")))
            both = np.concatenate([keys, values], axis=1)
            yield name.replace(".embed_q.", ".kv_b_proj."), both.reshape(-1, both.shape[-1])
        else:
            yield transformers_name(name), next(parameter(name))


def _quantization(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("quantization") or {}


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(path, "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - safe_open has no iterator
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _shapes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type, shape) of every tensor."""
    return {name: entry for path in _files(folder) for name, entry in _header(path).items()}
