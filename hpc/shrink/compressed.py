"""What is in a compressed-tensors folder, and a transformers model matrix by matrix."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from hpc.errors import ArtifactError
from hpc.model.build import tensor_group


def named_matrices(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of a model with their names, an expert's matrices by themselves.

    transformers fuses experts; once auto-round was at work in a process it may keep them as a list of modules instead.
    """
    for name, parameter in model.named_parameters():
        layer, part = name.rsplit(".", 1)
        if parameter.dim() < 3:
            yield name, parameter
            continue
        for expert, matrix in enumerate(parameter):
            if part == "gate_up_proj":
                gate, up = matrix.chunk(2)
                yield f"{layer}.{expert}.gate_proj.weight", gate
                yield f"{layer}.{expert}.up_proj.weight", up
            else:
                yield f"{layer}.{expert}.{part}.weight", matrix


def check_packed(packed: dict[str, Any], matrices: dict[str, int]) -> None:
    """Whether all was quantized that should be. Raises ArtifactError.

    matrices: how many matrices of each group the model has, each expert's by itself; packed: `packed_census` of the
    artifact.
    """
    for group, wanted in matrices.items():
        found = packed.get(group, {}).get("packed_tensors", 0)
        if found != wanted:
            raise ArtifactError(f"{found} of {wanted} matrices of {group} were quantized: the artifact is refused")


def packed_census(folder: Path) -> dict[str, Any]:
    """Tensors and bytes on disk by group, and how many of them are packed integers or 8-bit floats."""
    groups: dict[str, dict[str, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open has no iterator
                tensor = file.get_tensor(name)
                entry = groups.setdefault(tensor_group(name), {"tensors": 0, "packed_tensors": 0, "bytes": 0})
                entry["tensors"] += 1
                entry["packed_tensors"] += name.endswith("weight_packed") or tensor.dtype == torch.float8_e4m3fn
                entry["bytes"] += tensor.numel() * tensor.element_size()
    return groups


def quantized_bits(folder: Path) -> float | None:
    """Bits a weight of the matrices that were quantized, scales and zero points included; None when there are none."""
    bits, weights = 0, 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - as above
            scaled = {name.removesuffix("weight_scale") for name in tensors if name.endswith(".weight_scale")}
            for name in tensors:
                place, _, part = name.rpartition(".")
                if f"{place}." not in scaled or not part.startswith("weight"):
                    continue
                if part == "weight_shape":
                    weights += int(file.get_tensor(name).prod())
                    continue
                tensor = file.get_tensor(name)
                bits += 8 * tensor.numel() * tensor.element_size()
                weights += tensor.numel() if part == "weight" else 0
    return bits / weights if weights else None
