"""Adapters folded into their base. artifact/: a plain transformers folder, compared with base + adapters."""

import json
import shutil

import torch

from hpc.adapt.merge import merge
from hpc.config import Merge
from hpc.errors import ArtifactError
from hpc.model.build import load_model, save_model
from hpc.run.task import Context, Result
from hpc.stages.common import copy_tokenizer_files
from hpc.stages.lora import BASE_FILE


def run(context: Context) -> Result:
    """Do the stage. Raises ArtifactError when an adapter belongs to another model or the merge is not exact."""
    stage = context.task.stage
    assert isinstance(stage, Merge)
    base_name, base = context.inputs("model")[0]
    adapters = context.inputs("adapter")
    held_out: list[list[int]] = []
    for name, folder in adapters:
        trained_on = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
        if trained_on["digest"] != context.input_receipt(base_name).digest:
            raise ArtifactError(
                f"adapter {name!r} was trained on {trained_on['stage']!r}, not on {base_name!r}: name that one in needs"
            )
        held_out += trained_on["held_out_ids"]
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
