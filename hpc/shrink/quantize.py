"""A quantized model beside its source: what a library wrote is read back and compared, and what is in its files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from hpc.errors import ArtifactError
from hpc.model.build import load_model, tensor_group
from hpc.shrink.matrices import accepted_error

KL_LIMIT = {2: 2.0, 3: 0.5, 4: 0.05, 5: 0.02, 6: 0.01, 7: 0.007, 8: 0.005}
"""Largest accepted KL divergence (nats per token) from the source, by bits; a misread artifact is far above it."""


@dataclass(frozen=True)
class Comparison:
    """A quantized model against its source on the same ids."""

    kl: float
    """Mean KL(source || quantized), nats per token."""
    top1_agreement: float
    """Fraction of positions with the same most likely token."""


def load_any_model(folder: Path) -> PreTrainedModel:
    """A plain or quantized model in fp32; quantized weights are unpacked. Raises ArtifactError for missing tensors."""
    return load_model(folder, torch.float32)


def compare(source: PreTrainedModel, quantized: PreTrainedModel, ids: torch.Tensor) -> Comparison:
    """Compare two models on ids (B, S)."""
    with torch.no_grad():
        p = source(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        q = quantized(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return Comparison(kl, float((p.argmax(-1) == q.argmax(-1)).float().mean()))


def check_matrices(source: PreTrainedModel, quantized: PreTrainedModel, bits: int) -> float:
    """Compare every matrix read back with its source, an expert's by itself; returns the largest relative error.

    The divergence of a whole model hardly moves when one expert of many is wrong. Raises ArtifactError that names it.
    """
    held, worst = dict(_matrices(quantized)), 0.0
    for name, wanted in _matrices(source):
        if name not in held:
            raise ArtifactError(f"the quantized model read back has no {name}: the artifact is refused")
        first, second = wanted.detach().float(), held[name].detach().float()
        size = first.square().sum().sqrt()
        error = float((first - second).square().sum().sqrt() / size) if size else float(second.abs().max())
        if not error <= accepted_error(bits):
            raise ArtifactError(
                f"the quantized model read back has another {name}: {error:.2f} of its size away, accepted is "
                f"{accepted_error(bits):.2f} at {bits} bits: the artifact is refused"
            )
        worst = max(worst, error)
    return worst


def _matrices(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters with their names, an expert's matrices by themselves.

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


def check(comparison: Comparison, packed: dict[str, Any], matrices: dict[str, int], bits: int) -> None:
    """Refuse an artifact that is not what it says. Raises ArtifactError.

    matrices: how many matrices of each group the model has, each expert's by itself; packed: `packed_census` of the
    artifact.
    """
    for group, wanted in matrices.items():
        found = packed.get(group, {}).get("packed_tensors", 0)
        if found != wanted:
            raise ArtifactError(f"{found} of {wanted} matrices of {group} were quantized: the artifact is refused")
    if not comparison.kl <= KL_LIMIT[bits]:
        raise ArtifactError(
            f"the quantized model read back differs from its source by KL {comparison.kl:.4f} nats per token where "
            f"{KL_LIMIT[bits]} is accepted at {bits} bits: the artifact is refused"
        )


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
