"""Post-training quantization, read back and compared. artifact/: a transformers folder in compressed-tensors format."""

import math
from pathlib import Path

import numpy as np
import torch

from hpc.config import Quantize
from hpc.data.store import TokenStore
from hpc.errors import ConfigError
from hpc.model.build import FEED_FORWARD, load_model, tensor_group
from hpc.reuse.stored import StoredModel
from hpc.run.directory import file_sizes
from hpc.run.task import Context, Result
from hpc.shrink.quantize import check, check_matrices, compare, packed_census, quantize
from hpc.stages.common import copy_tokenizer_files

PROBE_LENGTH = 128
"""Ids of each sequence that source and artifact are compared on."""


def run(context: Context) -> Result:
    """Do the stage. Raises ArtifactError when the artifact read back is not the model."""
    stage = context.task.stage
    assert isinstance(stage, Quantize)
    name, source = context.inputs("model")[0]
    context.progress("loading")
    model = load_model(source).eval()
    config = model.config
    expert_size = int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    matrices, expert_parameters = _matrices(source)
    for setting, size in (("hidden_size", config.hidden_size), ("expert_size", expert_size)):
        if size % stage.group_size:
            raise ConfigError(
                f"group_size {stage.group_size} does not divide {setting} {size} of {name!r}: choose 64 or 32"
            )

    artifact = context.directory.artifact
    staging = artifact.with_name(".artifact")
    context.progress(f"quantizing to {stage.bits} bits")
    quantize(source, staging, stage.bits, stage.group_size, artifact.with_name(".scratch"))
    copy_tokenizer_files(source, staging)

    context.progress("reading back")
    ids, of_what = _probe(context, config.vocab_size)
    read = load_model(staging).eval()
    comparison = compare(model, read, ids)
    packed = packed_census(staging)
    check(comparison, packed, matrices, stage.bits)
    worst = check_matrices(model, read, stage.bits)
    staging.rename(artifact)

    weights_before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    weights_after = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    parameters = model.num_parameters()
    metrics = {
        "bits": stage.bits,
        "bits_per_weight": 8 * weights_after / parameters,
        "expert_bits_per_weight": 8 * packed["experts"]["bytes"] / expert_parameters if expert_parameters else None,
        "bytes_before": weights_before,
        "bytes_after": weights_after,
        "artifact_bytes": file_sizes(artifact),
        "kl": comparison.kl,
        "max_matrix_error": worst,
        "top1_agreement": comparison.top1_agreement,
    }
    read_back = f"measured: artifact read back by transformers against its source, {ids.numel()} {of_what} ids"
    provenance = {
        "bits": "derived: from the configuration",
        "bits_per_weight": "derived: weight files / parameters, embedding and head included",
        "expert_bits_per_weight": "derived: bytes of expert tensors / expert parameters",
        "bytes_before": "measured: weight files of the source",
        "bytes_after": "measured: weight files of the artifact",
        "artifact_bytes": "measured: all files of the artifact",
        "kl": read_back,
        "max_matrix_error": "measured: every matrix read back, root mean square relative to its source",
        "top1_agreement": read_back,
    }
    return Result(metrics, provenance, packed, ("torch", "transformers", "auto-round", "compressed-tensors"))


def _probe(context: Context, vocab_size: int) -> tuple[torch.Tensor, str]:
    """Ids (B, S) to compare on, and what they are."""
    rows = [TokenStore(folder / "held_out").tokens for _, folder in context.inputs("tokens")]
    rows = [row[: 4 * PROBE_LENGTH].reshape(-1, PROBE_LENGTH) for row in rows if len(row) >= 4 * PROBE_LENGTH]
    if rows:
        return torch.from_numpy(np.concatenate(rows).astype(np.int64)), "held-out"
    random = torch.Generator().manual_seed(context.task.seed)
    return torch.randint(vocab_size, (4, PROBE_LENGTH), generator=random), "random"


def _matrices(source: Path) -> tuple[dict[str, int], int]:
    """Matrices of experts and of dense feed-forward blocks, by group, and the parameters of all experts."""
    counts: dict[str, int] = {}
    parameters = 0
    for name, shape in StoredModel(source).shapes.items():
        group = tensor_group(name)
        if group == "experts":
            counts[group] = counts.get(group, 0) + shape[0]
            parameters += math.prod(shape)
        elif group == FEED_FORWARD and len(shape) == 2 and name.endswith("_proj.weight"):
            counts[group] = counts.get(group, 0) + 1
    return counts, parameters
