"""The door to auto-round: weight-only quantization of linear layers and experts into the compressed-tensors format.

Round-to-nearest, tensor by tensor from disk, so memory does not grow with the model. transformers and vLLM read the
format; transformers unpacks it to full precision at load, so the file shrinks, not the memory of a transformers
process. Embedding, head, norms and router keep their precision.

What a library writes is not believed: `check` reads the artifact back and compares it with its source.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hpc.errors import ArtifactError
from hpc.model.build import load_model, tensor_group

KL_LIMIT = {4: 0.05, 8: 0.005}
"""Largest accepted KL divergence (nats per token) from the source; a misread artifact is far above it."""


@dataclass(frozen=True)
class Comparison:
    """A quantized model against its source on the same ids."""

    kl: float
    """Mean KL(source || quantized), nats per token."""
    top1_agreement: float
    """Fraction of positions with the same most likely token."""


def quantize(source: Path, folder: Path, bits: int, group_size: int, scratch: Path) -> None:
    """Quantize a transformers folder into `folder`. Raises ArtifactError when auto-round leaves no model behind."""
    from auto_round import AutoRound

    shutil.rmtree(scratch, ignore_errors=True)
    rounding = AutoRound(
        str(source), bits=bits, group_size=group_size, sym=True, iters=0, disable_opt_rtn=True, device_map="cpu",
        scheme=f"W{bits}A16",
    )  # fmt: skip
    with _mixtral_read():
        rounding.quantize_and_save(output_dir=str(scratch), format="llm_compressor")
    written = [path.parent for path in scratch.rglob("config.json")]
    if len(written) != 1:
        raise ArtifactError(f"auto-round wrote {len(written)} models into {scratch} where one was expected")
    written[0].rename(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    _name_as_mixtral(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


@contextmanager
def _mixtral_read() -> Iterator[None]:
    """Let auto-round find Mixtral's experts while it reads a model layer by layer.

    It renames either the module (`block_sparse_moe`) or the matrix (`w1`), and Mixtral's files rename both.
    """
    from auto_round.utils import disk_stream_util as streaming

    known = streaming._renamed_expert_candidates

    def candidates(index: Any, name: str) -> Iterator[str]:
        for candidate in known(index, name):
            yield candidate
            yield candidate.replace(".mlp.experts.", ".block_sparse_moe.experts.")

    streaming._renamed_expert_candidates = candidates
    try:
        yield
    finally:
        streaming._renamed_expert_candidates = known


def _name_as_mixtral(folder: Path) -> None:
    """Give Mixtral's quantized experts the names transformers and vLLM read; auto-round's loader does not find them."""
    matrices = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    pattern = re.compile(r"(?<=\.block_sparse_moe\.experts\.)(\d+)\.(gate_proj|down_proj|up_proj)(?=\.)")

    def renamed(name: str) -> str:
        return pattern.sub(lambda found: f"{found[1]}.{matrices[found[2]]}", name)

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if any(renamed(name) != name for name in tensors):
            save_file({renamed(name): tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(renamed(index.read_text()))


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


MATRIX_LIMIT = {4: 0.5, 8: 0.05}
"""Largest accepted error of one matrix, root mean square relative to its own; round-to-nearest makes 0.1 and 0.01.
Another matrix in its place makes 1.4."""


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
        if not error <= MATRIX_LIMIT[bits]:
            raise ArtifactError(
                f"the quantized model read back has another {name}: {error:.2f} of its size away, accepted is "
                f"{MATRIX_LIMIT[bits]} at {bits} bits: the artifact is refused"
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
    """Tensors and bytes on disk by group, and how many of them are packed integers."""
    groups: dict[str, dict[str, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open has no iterator
                tensor = file.get_tensor(name)
                entry = groups.setdefault(tensor_group(name), {"tensors": 0, "packed_tensors": 0, "bytes": 0})
                entry["tensors"] += 1
                entry["packed_tensors"] += name.endswith("weight_packed")
                entry["bytes"] += tensor.numel() * tensor.element_size()
    return groups
