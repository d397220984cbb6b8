"""Adapters folded into their base. artifact/: a plain transformers folder, compared with base + adapter."""

import json
import shutil

import torch

from hpc.adapt.lora import merge
from hpc.config import Merge
from hpc.data.tokenizer import FILES
from hpc.errors import ArtifactError
from hpc.model.build import census, load_model
from hpc.run.task import Context, Result
from hpc.stages.common import copy_tokenizer_files
from hpc.stages.lora import BASE_FILE

TOLERANCE = 1e-4
"""Largest accepted difference of logits between base + adapter and the merged model, fp32."""


def run(context: Context) -> Result:
    """Do the stage. Raises ArtifactError when the adapter belongs to another model or the merge is not exact."""
    assert isinstance(context.task.stage, Merge)
    (base_name, base), (adapter_name, adapter) = context.inputs("model")[0], context.inputs("adapter")[0]
    trained_on = json.loads((adapter / BASE_FILE).read_text(encoding="utf-8"))
    if trained_on["digest"] != context.input_receipt(base_name).digest:
        raise ArtifactError(
            f"adapter {adapter_name!r} was trained on {trained_on['stage']!r}, not on {base_name!r}: "
            "name that one in needs"
        )
    context.progress("merging")
    model = load_model(base).eval()
    probe = torch.randint(model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(context.task.seed))
    merged, difference = merge(model, adapter, probe)
    if not difference <= TOLERANCE:
        raise ArtifactError(f"merged and adapted logits differ by {difference:.2e} where {TOLERANCE:.0e} is accepted")
    staging = context.directory.artifact.with_name(".artifact")
    shutil.rmtree(staging, ignore_errors=True)
    merged.save_pretrained(staging)
    copy_tokenizer_files(base, staging)
    assert (staging / FILES[0]).is_file()
    staging.rename(context.directory.artifact)
    return Result(
        {"max_abs_logit_difference": difference},
        {"max_abs_logit_difference": "measured: merged against base + adapter on 128 random ids, fp32"},
        census(dict(merged.state_dict())),
        ("torch", "transformers", "peft"),
    )
