"""A model on disk compared, tensor by tensor and expert by expert, with the weights that were meant to be written.

Saving a mixture of experts is a conversion: transformers holds gate_up_proj (E, 2I, H) and down_proj (E, H, I), the
file holds one gate, up and down matrix per expert, under names that depend on the architecture. A conversion that
swaps gate and up, or writes one expert twice, still loads everywhere and answers a little worse. So the file is read
back as plain tensors, without transformers, and each matrix has to have the hash of its part of the fused one.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from hpc.errors import ArtifactError

ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
"""What an expert's matrix does, from its name in a file: Qwen3-MoE, OLMoE and DeepSeek; Mixtral."""
FUSED = re.compile(r"layers\.(\d+)\..*\.experts\.(gate_up_proj|down_proj)$")
SINGLE = re.compile(rf"layers\.(\d+)\..*\.experts\.(\d+)\.({'|'.join(ROLES)})\.weight$")

Part = tuple[int, int, str] | str
"""(layer, expert, role) of an expert's matrix; the name of any other tensor."""


def verify_model(folder: Path, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Compare a transformers folder with the weights it was made from; returns one XXH3-64 per layer over its experts.

    Raises ArtifactError that names layer and expert of the first difference.
    """
    wanted = {part: _hash(tensor) for name, tensor in state.items() for part, tensor in _parts(name, tensor)}
    found = {part: _hash(tensor) for name, tensor in _stored(folder) for part, tensor in _parts(name, tensor)}
    problems = sorted({_place(part) for part in wanted.keys() | found.keys() if wanted.get(part) != found.get(part)})
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ArtifactError(f"{folder} does not hold what was trained: {problems[0]} differs{more}; write it again")
    layers: dict[int, Any] = {}
    for part in sorted(part for part in found if not isinstance(part, str)):
        layers.setdefault(part[0], xxhash.xxh3_64()).update(found[part])
    return {str(layer): digest.hexdigest() for layer, digest in layers.items()}


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[Part, Tensor]]:
    """A tensor cut into the matrices of single experts, when it holds any."""
    if single := SINGLE.search(name):
        yield (int(single[1]), int(single[2]), ROLES[single[3]]), tensor
    elif fused := FUSED.search(name):
        for expert, matrix in enumerate(tensor):
            if fused[2] == "down_proj":
                yield (int(fused[1]), expert, "down"), matrix
            else:
                gate, up = matrix.chunk(2)
                yield (int(fused[1]), expert, "gate"), gate
                yield (int(fused[1]), expert, "up"), up
    else:
        yield name.replace(".block_sparse_moe.", ".mlp."), tensor


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                yield name, file.get_tensor(name)


def _hash(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous()
    shape = f"{values.dtype} {tuple(values.shape)}".encode()
    return xxhash.xxh3_128(shape + values.flatten().view(torch.uint8).numpy().tobytes()).digest()


def _place(part: Part) -> str:
    return part if isinstance(part, str) else f"layer {part[0]}, expert {part[1]}: {part[2]}"
