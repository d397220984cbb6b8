"""Post-training quantization, read back and compared. artifact/: a transformers folder in compressed-tensors format."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpc.config import Quantize
from hpc.data.store import TokenStore
from hpc.errors import ConfigError
from hpc.model.build import FEED_FORWARD, load_config, tensor_group
from hpc.reuse.stored import StoredModel
from hpc.reuse.streamed import streamed_model
from hpc.run.directory import file_sizes
from hpc.run.task import Context, Result
from hpc.runtimes.hugging_face import Transformers
from hpc.shrink.allocation import Unit, allocate, with_experts_together
from hpc.shrink.calibration import Ids, windows
from hpc.shrink.compressed import check_packed, named_matrices, packed_census, quantized_bits
from hpc.shrink.library import quantize_apart
from hpc.shrink.matrices import Named, check_matrices
from hpc.shrink.passport import Passport, census, covered, passport
from hpc.shrink.proof import check_agreement, compare
from hpc.shrink.request import Request
from hpc.shrink.sensitivity import measure
from hpc.stages.common import check_vocabulary, copy_tokenizer_files, experts_of, probe_sequences, workspace

KEPT_BESIDES = ("_scale", "_zero_point", "_shape", "_packed")
"""Ends of the names of what compressed-tensors keeps of a matrix besides its weights."""
BITS = (2, 3, 4, 5, 6, 8)
"""What a part may get under a budget. 8 bits have no zero point (hpc/config/stages.py)."""
FP8_LIKE = 5
"""E4M3 keeps 3 bits behind the leading one: its error is like that of 5 bits in groups."""


@dataclass(frozen=True)
class Looked:
    """What calibration text said."""

    ids: Ids | None = None
    passport: Passport | None = None
    layers: list[int] = field(default_factory=list)
    """Numbers of the MoE layers among all decoder layers."""
    units: dict[str, Unit] = field(default_factory=dict)
    """Errors of all parts, where there is a budget."""
    bits: dict[str, int] = field(default_factory=dict)
    """Bits of the parts, where there is a budget."""

    @property
    def usual_bits(self) -> int | None:
        """What most weights get, where there is a budget."""
        weights: Counter[int] = Counter()
        for name, bits in self.bits.items():
            weights[bits] += self.units[name].parameters
        return weights.most_common(1)[0][0] if weights else None

    def bits_of(self, usual: int) -> dict[str, int]:
        """Matrices that get other bits than the usual."""
        return {
            matrix: bits for name, bits in self.bits.items() if bits != usual for matrix in self.units[name].matrices
        }

    @property
    def nearest(self) -> list[str]:
        """Matrices of experts that saw too little."""
        if self.passport is None:
            return []
        short = {(self.layers[layer], expert) for layer, expert, _ in self.passport.short}
        return [
            f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
            for layer, expert in sorted(short)
            for part in ("gate", "up", "down")
        ]


def run(context: Context) -> Result:
    """Do the stage. Raises ArtifactError when the artifact read back is not the model."""
    stage = context.task.stage
    assert isinstance(stage, Quantize)
    name, source = context.inputs("model")[0]
    config = load_config(source)
    _check_groups(stage, name, config)
    if experts_of(config) and not stage.symmetric:
        raise ConfigError(
            f"symmetric = false, but {name!r} has experts, and transformers reads no zero points of theirs: set "
            "symmetric: true"
        )
    check_vocabulary(context, name, config)
    matrices, expert_parameters = _matrices(source)
    looked = _look(context, stage, source, config) if stage.looks_at_text else Looked()
    usual = looked.usual_bits or stage.bits

    artifact = context.directory.artifact
    words = f"quantizing to {'about ' if looked.bits else ''}{usual} bits"
    context.progress(words)

    def told(done: float, total: float) -> None:
        context.check_budget()
        context.progress(words, done=done, total=total)

    with workspace(context) as (staging, scratch):
        ids_file = scratch.with_name(".scratch.npy")
        if stage.method != "rtn" and looked.ids is not None:
            np.save(ids_file, looked.ids)
        request = Request(
            source=str(source), target=str(staging), scratch=str(scratch), format=stage.format, bits=usual,
            group_size=stage.group_size, symmetric=stage.symmetric,
            ids=str(ids_file) if stage.method != "rtn" else None, iterations=stage.calibration.iterations,
            batch_size=stage.calibration.batch_size, bits_of=looked.bits_of(usual), nearest=looked.nearest,
        )  # fmt: skip
        peak = quantize_apart(request, told)
        copy_tokenizer_files(source, staging)

        context.progress("reading back")
        original, read = Transformers(source), Transformers(staging)
        sequences, of_what = probe_sequences(context, stage.proof_tokens, config.vocab_size)
        agreement = compare(original, read, sequences)
        packed = packed_census(staging)
        fewest = min(looked.bits.values(), default=stage.bits if stage.format == "int" else FP8_LIKE)
        check_packed(packed, matrices)
        check_agreement(agreement, fewest, stage.accepted_kl)
        errors = check_matrices(_named(original), _named(read), fewest)
        staging.rename(artifact)

    weights_before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    weights_after = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    parameters = original.model.num_parameters()
    saw = looked.passport
    metrics = {
        "bits": usual,
        "bits_per_weight": 8 * weights_after / parameters,
        "matrix_bits_per_weight": quantized_bits(artifact),
        "expert_bits_per_weight": 8 * packed["experts"]["bytes"] / expert_parameters if expert_parameters else None,
        "bytes_before": weights_before,
        "bytes_after": weights_after,
        "artifact_bytes": file_sizes(artifact),
        "perplexity_ratio": agreement.perplexity_ratio,
        "kl": agreement.kl,
        "top1_agreement": agreement.top1_agreement,
        "bits_per_byte": agreement.bits_per_byte if of_what == "held-out" else None,
        "max_matrix_error": errors.worst,
        "worst_matrix": errors.worst_name,
        "calibration_tokens": None if looked.ids is None else looked.ids.size,
        "min_expert_tokens": saw.fewest if saw else None,
        "experts_under_minimum": len(saw.short) if saw else None,
        "quantize_peak_bytes": peak,
    }
    read_back = f"measured: artifact read back by transformers beside its source, {agreement.tokens:,} {of_what} ids"
    provenance = {
        "bits": "derived: from the configuration; of most weights where there is a budget",
        "bits_per_weight": "derived: weight files / parameters, embedding and head included",
        "matrix_bits_per_weight": "derived: bytes of quantized matrices with scales and zero points / their weights",
        "expert_bits_per_weight": "derived: bytes of expert tensors / expert parameters",
        "bytes_before": "measured: weight files of the source",
        "bytes_after": "measured: weight files of the artifact",
        "artifact_bytes": "measured: all files of the artifact",
        "perplexity_ratio": read_back,
        "kl": read_back,
        "bits_per_byte": read_back,
        "worst_matrix": "measured: the matrix of max_matrix_error",
        "max_matrix_error": "measured: every matrix read back, root mean square relative to its source",
        "top1_agreement": read_back,
        "calibration_tokens": "measured: held-in tokens that were looked at",
        "min_expert_tokens": "measured: calibration tokens of the expert that saw fewest",
        "experts_under_minimum": "derived: experts that saw fewer than calibration.min_expert_tokens",
        "quantize_peak_bytes": "measured: most resident memory of the process that quantized (VmHWM)",
    }
    return Result(
        metrics, provenance, {**packed, **_told(looked)}, ("torch", "transformers", "auto-round", "compressed-tensors")
    )


def _look(context: Context, stage: Quantize, source: Path, config: Any) -> Looked:
    """Run calibration text through the model, one layer in memory at a time."""
    wanted = stage.calibration
    if wanted.seq_len > config.max_position_embeddings:
        raise ConfigError(
            f"calibration.seq_len {wanted.seq_len} is longer than the context of the model, "
            f"{config.max_position_embeddings}: choose at most that"
        )
    texts = [TokenStore(folder / "train").tokens for _, folder in context.inputs("tokens")]

    def draw(tokens: int) -> Ids:
        return windows(texts, tokens, wanted.seq_len)

    if not experts_of(config) and stage.bits_per_weight is None:
        return Looked(draw(wanted.tokens))
    context.progress("looking at calibration text")
    model = streamed_model(source)
    seen, layers, ids = None, _moe_layers(model), draw(wanted.tokens)
    if layers:
        ids, seen = covered(
            draw, lambda ids: passport(model, ids, wanted.min_expert_tokens), wanted.tokens, wanted.most_tokens
        )
    if stage.bits_per_weight is None:
        return Looked(ids, seen, layers)
    context.progress("measuring what rounding does to each part")
    units = with_experts_together(measure(model, ids, BITS, stage.group_size, stage.symmetric))
    return Looked(ids, seen, layers, units, allocate(units, stage.bits_per_weight, stage.group_size, stage.symmetric))


def _moe_layers(model: Any) -> list[int]:
    return [number for number, layer in enumerate(model.layers) if hasattr(getattr(layer, "mlp", None), "experts")]


def _told(looked: Looked) -> dict[str, Any]:
    """For the receipt: who saw how many tokens, and which part got how many bits."""
    told: dict[str, Any] = {}
    if looked.passport is not None:
        told["calibration"] = census(looked.passport, looked.layers)
    if looked.bits:
        told["bits"] = {
            name: {"bits": bits, "error": looked.units[name].errors[bits]} for name, bits in looked.bits.items()
        }
    return told


def _check_groups(stage: Quantize, name: str, config: Any) -> None:
    """Raises ConfigError when groups do not divide the rows of every matrix."""
    if stage.format == "fp8":
        return
    expert_size = int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    for setting, size in (("hidden_size", config.hidden_size), ("expert_size", expert_size)):
        if size % stage.group_size:
            raise ConfigError(
                f"group_size {stage.group_size} does not divide {setting} {size} of {name!r}: choose 64 or 32"
            )


def _named(opened: Transformers) -> Iterator[Named]:
    """Parameters of a model; what a quantized one keeps besides, such as scales, left out."""
    for name, tensor in named_matrices(opened.model):
        if not name.endswith(KEPT_BESIDES):
            yield name, tensor.detach().float().cpu().numpy()


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
