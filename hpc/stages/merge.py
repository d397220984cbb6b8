"""Adapters folded into their base. artifact/: a plain transformers folder, compared with base + adapters."""

import json
import shutil
from pathlib import Path

import torch

from hpc.adapt.merge import merge
from hpc.config import Merge
from hpc.errors import ArtifactError
from hpc.model.build import load_model, save_model
from hpc.model.routing import PASSPORT
from hpc.run.directory import write_json
from hpc.run.task import Context, Result
from hpc.stages.common import BASE_FILE, copy_tokenizer_files


def _check_base(name: str, adapter: Path, base_name: str, digest: str) -> list[list[int]]:
    """Whether an adapter was trained on this base, by the hash of all its files; returns its held-out ids.

    Raises ArtifactError.
    """
    try:
        trained_on = json.loads((adapter / BASE_FILE).read_text(encoding="utf-8"))
        stage, trained_digest = trained_on["stage"], trained_on["digest"]
        held_out: list[list[int]] = trained_on["held_out_ids"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(
            f"adapter {name!r} does not say what it was trained on ({BASE_FILE} cannot be read): only adapters of a "
            "lora stage are merged"
        ) from None
    if trained_digest == digest:
        return held_out
    if stage == base_name:
        raise ArtifactError(
            f"adapter {name!r} was trained on other weights of {base_name!r} (digest {trained_digest[:12]}, now "
            f"{digest[:12]}): restore them, or train the adapter again"
        )
    raise ArtifactError(f"adapter {name!r} was trained on {stage!r}, not on {base_name!r}: name that one in needs")


def _take_passport(base_name: str, base: Path, merged: Path) -> None:
    """Where tokens went in the base: adapters leave its routers alone, so that is the best guess. It says whose it is.

    What the merged model's tokens do was not measured: its attention is another one.
    """
    if (base / PASSPORT).is_file():
        known = json.loads((base / PASSPORT).read_text(encoding="utf-8"))
        write_json(merged / PASSPORT, {"measured_on": base_name, **known})


def run(context: Context) -> Result:
    """Do the stage. Raises ArtifactError when an adapter belongs to another model or the merge is not exact."""
    stage = context.task.stage
    assert isinstance(stage, Merge)
    base_name, base = context.inputs("model")[0]
    adapters = context.inputs("adapter")
    held_out: list[list[int]] = []
    for name, folder in adapters:
        held_out += _check_base(name, folder, base_name, context.input_receipt(base_name).digest)
    context.progress("merging")
    model = load_model(base)
    probe = torch.tensor([row[: min(map(len, held_out))] for row in held_out])
    weighted = [(folder, stage.weights.get(name, 1.0)) for name, folder in adapters]
    merged = merge(model, weighted, probe, stage.combination, stage.density, context.task.seed)
    difference = merged.difference
    if difference is not None and not difference.accepted:
        raise ArtifactError(f"logits of the merged model and of base + adapters differ by {difference}")
    staging = context.directory.artifact.with_name(".artifact")
    shutil.rmtree(staging, ignore_errors=True)
    written = save_model(model.config, dict(merged.model.state_dict()), staging)
    copy_tokenizer_files(base, staging)
    _take_passport(base_name, base, staging)
    staging.rename(context.directory.artifact)
    compared = f"not measured: {stage.combination} is no sum"
    if difference:
        compared = f"measured: merged against base + adapters, {probe.numel()} held-out ids, {difference.precision}"
    experts, others = merged.changed["experts"], merged.changed["others"]
    return Result(
        {
            "max_abs_logit_difference": difference and difference.absolute,
            "max_relative_logit_difference": difference and difference.relative,
            "expert_matrices_changed": experts[0],
            "expert_matrices_adapted": experts[1],
            "other_matrices_changed": others[0],
        },
        {
            "max_abs_logit_difference": compared,
            "max_relative_logit_difference": compared,
            "expert_matrices_changed": "measured: counted while merging",
            "expert_matrices_adapted": "measured: counted while merging",
            "other_matrices_changed": "measured: counted while merging",
        },
        written,
        ("torch", "transformers", "peft"),
    )
