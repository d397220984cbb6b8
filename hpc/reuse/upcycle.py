"""Dense to sparse: feed-forward blocks become experts that together compute the same (upcycling).

Copies of the whole block (arXiv:2212.05055), or of its parts: cut into G parts of the width, a token that takes one
copy of each part and weights them equally gets the block's output over G, so down projections are scaled by G
(arXiv:2410.07524, section 3). One row of the router, shared by the copies of a virtual group, sends it to all of them.
S shared parts are one SwiGLU that all tokens use (Qwen1.5-MoE); its gate starts at sigmoid(0) = 1/2, its down
projection at twice.

Layer by layer from file to file: memory does not grow with the model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hpc.config.reuse import Upcycle
from hpc.errors import ArtifactError
from hpc.reuse.dense import DENSE_OF, DenseModel
from hpc.reuse.shape import sparse_config
from hpc.reuse.stored import EXPERTS, StoredModel
from hpc.run.directory import write_json

MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Expert:
    """An expert's matrices: gate (I, H), up (I, H), down (H, I)."""

    gate: Tensor
    up: Tensor
    down: Tensor


def upcycle(source: DenseModel, wanted: Upcycle, folder: Path, seed: int) -> None:
    """Write the sparse model of a dense checkpoint: config.json, one safetensors file per layer, the index."""
    config = sparse_config(source.config, wanted)
    layers = int(config["num_hidden_layers"])
    weight_map: dict[str, str] = {}
    total = 0
    random = torch.Generator().manual_seed(seed)
    for number in range(layers + 1):
        part = f".layers.{number}."
        names = [name for name in source.shapes if (part in name if number < layers else ".layers." not in name)]
        tensors = {name: source.tensor(name) for name in names}
        if number < layers:
            tensors = dict(_sparse_layer(tensors, config, wanted, random))
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(contiguous, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _sparse_layer(
    dense: dict[str, Tensor], config: dict[str, Any], wanted: Upcycle, random: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one layer under the names of the sparse architecture's files."""
    mlp = {name.split(".")[-2]: tensor for name, tensor in dense.items() if ".mlp." in name}
    prefix = next(name for name in dense if ".mlp." in name).split(".mlp.")[0]
    yield from ((name, tensor) for name, tensor in dense.items() if ".mlp." not in name)
    parts, hidden = wanted.granularity, mlp["down_proj"].shape[0]
    size = mlp["gate_proj"].shape[0] // parts
    is_mixtral = config["model_type"] == "mixtral"
    block = f"{prefix}.{'block_sparse_moe' if is_mixtral else 'mlp'}"
    shared, routed = wanted.shared, wanted.routed_parts
    if config["model_type"] == "qwen2_moe":
        kept = slice(0, shared * size) if shared else slice(0, size)
        scale = 2.0 if shared else 0.0
        yield f"{block}.shared_expert.gate_proj.weight", mlp["gate_proj"][kept]
        yield f"{block}.shared_expert.up_proj.weight", mlp["up_proj"][kept]
        yield f"{block}.shared_expert.down_proj.weight", mlp["down_proj"][:, kept] * scale
        yield f"{block}.shared_expert_gate.weight", torch.zeros(1, hidden, dtype=mlp["gate_proj"].dtype)
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if is_mixtral else {name: name for name in MLP}
    for expert in range(wanted.num_experts):
        at = shared + expert % routed
        rows = slice(at * size, (at + 1) * size)
        matrices = {
            "gate_proj": mlp["gate_proj"][rows],
            "up_proj": mlp["up_proj"][rows],
            "down_proj": mlp["down_proj"][:, rows] * routed,
        }
        for name, matrix in matrices.items():
            yield f"{block}.experts.{expert}.{names[name]}.weight", _with_noise(matrix, wanted.noise, random)
    groups = torch.randn(wanted.num_experts // routed, hidden, generator=random) * wanted.router_std
    yield f"{block}.gate.weight", groups.repeat_interleave(routed, 0).to(mlp["gate_proj"].dtype)


def _with_noise(matrix: Tensor, noise: float, random: torch.Generator) -> Tensor:
    if not noise:
        return matrix
    spread = float(matrix.float().std()) * noise
    return (matrix.float() + spread * torch.randn(matrix.shape, generator=random)).to(matrix.dtype)


SLACK = 1.5
"""Largest accepted noise on a matrix, relative to what was asked for. Another matrix in its place is 1.4 of its own
standard deviation away."""


def verify(source: DenseModel, wanted: Upcycle, folder: Path) -> int:
    """Read the sparse model back and compare every expert with its part of the dense block; returns how many matrices.

    Logits do not see an expert that the probe's tokens avoid, noise hides it, and large models are not loaded twice:
    this is exact without noise, and within its bounds with it. Raises ArtifactError that names layer, expert and role.
    """
    made, count = StoredModel(folder), 0
    for name in [name for name in made.shapes if EXPERTS.search(name)]:
        prefix, role = name.rsplit(".experts.", 1)
        dense = source.tensor(f"{prefix}.{DENSE_OF[role]}.weight").float()
        experts = made.tensor(name)
        if len(experts) != wanted.num_experts:
            raise ArtifactError(f"{folder}: {name} holds {len(experts)} of {wanted.num_experts} experts")
        for expert, matrix in enumerate(experts):
            _verify_part(
                f"{folder}: {name}, expert {expert}", matrix.float(), _part(dense, role, expert, wanted), wanted
            )
            count += 1
    return count


def _part(dense: Tensor, role: str, expert: int, wanted: Upcycle) -> Tensor:
    """What an expert is made of: rows of gate and up, columns of down."""
    axis = 1 if role == "w2" else 0
    size = dense.shape[axis] // wanted.granularity
    cut = dense.narrow(axis, (wanted.shared + expert % wanted.routed_parts) * size, size)
    return cut * wanted.routed_parts if role == "w2" else cut


def _verify_part(where: str, found: Tensor, part: Tensor, wanted: Upcycle) -> None:
    if found.shape != part.shape:
        raise ArtifactError(f"{where} is {tuple(found.shape)}, its part of the dense block is {tuple(part.shape)}")
    spread = float(part.std())
    off = float((found - part).square().mean().sqrt())
    if not off <= (SLACK * wanted.noise + ROUNDING) * spread:
        raise ArtifactError(
            f"{where} is not its part of the dense block: {off / spread:.3f} of its standard deviation away, where the "
            f"noise asked for is {wanted.noise:g}"
        )


ROUNDING = 0.004
"""Of bf16, relative."""
