"""A model that exists, checked tensor by tensor, dense ones made sparse on demand. artifact/: a transformers folder."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from hpc.config import Reuse
from hpc.data.tokenizer import FILES, load_tokenizer
from hpc.energy.lineage import record_origin
from hpc.errors import ArtifactError, DataError
from hpc.evaluate.sanity import TEXT, judge
from hpc.model.build import empty_model, load_config, load_model, tensor_group
from hpc.model.exactness import Difference, difference, exact_logits
from hpc.reuse.dense import DenseModel
from hpc.reuse.fetch import cache_folder, commit_of, locate
from hpc.reuse.gguf import convert
from hpc.reuse.stored import StoredModel, logical_parameters, weight_files
from hpc.reuse.upcycle import upcycle
from hpc.reuse.upcycle import verify as verify_upcycled
from hpc.run.directory import StageDirectory
from hpc.run.receipt import read_receipt, verify
from hpc.run.task import Context, Result
from hpc.stages.common import copy_tokenizer_files

PROBE_LIMIT_BYTES = 2**31
"""Models above this are not loaded whole to compare logits; the census of tensors is always made."""
WORSE_THAN_GUESSING = 1.1
"""Largest accepted loss on plain text, relative to that of a uniform guess, where a new model begins."""


def run(context: Context) -> Result:
    """Do the stage. Raises DataError for a source that cannot be used, ArtifactError for one that is not whole."""
    stage = context.task.stage
    assert isinstance(stage, Reuse)
    source = _source(context, stage)
    _note_origin(context, source)
    artifact = context.directory.artifact
    staging, scratch = artifact.with_name(".artifact"), artifact.with_name(".scratch")
    for folder in (staging, scratch):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if source.is_file():
        context.progress("converting the GGUF file")
        convert(source, scratch)
        folder = scratch
    else:
        folder = source
    distance: Difference | None = None
    compared: int | None = None
    if stage.upcycle:
        context.progress("upcycling")
        dense = DenseModel(folder)
        upcycle(dense, stage.upcycle, staging, context.task.seed)
        compared = verify_upcycled(dense, stage.upcycle, staging)
        copy_tokenizer_files(folder, staging)
        distance = _difference(folder, staging, context.task.seed)
        if distance and not stage.upcycle.noise and not distance.accepted:
            raise ArtifactError(f"logits of the dense and the upcycled model differ by {distance}")
    else:
        _take(folder, staging)
    context.progress("checking every tensor")
    census = _census(staging if stage.upcycle else folder)
    bits_per_byte = _check_sense(staging)
    shutil.rmtree(scratch)
    staging.rename(artifact)
    metrics = {
        "total_params": sum(group["parameters"] for group in census.values()),
        "source": stage.init.source if stage.init else stage.needs[0],
        "commit": commit_of(source),
        "expert_matrices_compared": compared,
        "max_abs_logit_difference": distance and distance.absolute,
        "max_relative_logit_difference": distance and distance.relative,
        "bits_per_byte": bits_per_byte,
    }
    how = "not measured: nothing to compare, or too large to load twice"
    if distance:
        how = f"measured: upcycled against dense, 128 random ids, {distance.precision}"
    provenance = {
        "total_params": "measured: counted over the tensors",
        "source": "derived: from the configuration",
        "commit": "derived: of the Hub's snapshot",
        "expert_matrices_compared": "measured: read back, each with its part of the dense block",
        "bits_per_byte": "measured: on a text of " + f"{len(TEXT.encode()):,} bytes (hpc/evaluate/sanity.py), fp32",
        "max_abs_logit_difference": how,
        "max_relative_logit_difference": how,
    }
    return Result(metrics, provenance, census, ("torch", "transformers", "safetensors"))


def _source(context: Context, stage: Reuse) -> Path:
    """The folder or .gguf file to take; on a compute node nothing is fetched. Raises DataError."""
    if stage.init is None:
        return context.inputs("model")[0][1]
    path = locate(stage.init, cache_folder(Path(context.task.run_directory)))
    if path is None:
        raise DataError(
            f"init.from = {stage.init.source!r} is not here: `launch.py run` or `submit` fetches it, where there is a "
            "network"
        )
    return path


def _note_origin(context: Context, source: Path) -> None:
    """The artifact of another run has its receipt beside it: it is verified, and its energy inherited."""
    base = StageDirectory(source.parent)
    if context.task.stage.needs or source.name != base.artifact.name or not base.receipt.exists():
        return
    receipt = read_receipt(base)
    assert receipt is not None
    verify(base, receipt)
    record_origin(context.directory, base.root, context.task.run)


def _take(source: Path, folder: Path) -> None:
    """Weights by hard link where the file system allows it, small files by copy. Code and pickles stay behind."""
    for path in weight_files(source):
        real = path.resolve()
        try:
            os.link(real, folder / path.name)
        except OSError:
            shutil.copyfile(real, folder / path.name)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json", *FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _census(folder: Path) -> dict[str, Any]:
    """Every parameter of the architecture has its tensor on disk, in its shape, and none is left over. Groups of them.

    Raises ArtifactError.
    """
    stored = StoredModel(folder)
    model = empty_model(load_config(folder))
    wanted = logical_parameters({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    wanted |= logical_parameters({name: tuple(b.shape) for name, b in model.named_buffers() if name in stored.shapes})
    if model.config.tie_word_embeddings:
        wanted |= {name: shape for name, shape in stored.shapes.items() if name == "lm_head.weight"}
    stored.check(wanted)
    _check_vocabulary(folder, model.config.vocab_size)
    groups: dict[str, Any] = {}
    for name, shape in wanted.items():
        entry = groups.setdefault(tensor_group(name), {"tensors": 0, "parameters": 0})
        entry["tensors"] += 1
        entry["parameters"] += torch.Size(shape).numel()
    return groups


def _check_vocabulary(folder: Path, entries: int) -> None:
    """Whether the model has an embedding for every token of its tokenizer. Raises ArtifactError."""
    if not (folder / "tokenizer.json").is_file():
        return
    known = load_tokenizer(folder).get_vocab_size()
    if known > entries:
        raise ArtifactError(
            f"the tokenizer of {folder.parent.name!r} knows {known:,} tokens, the model has embeddings for "
            f"{entries:,}, {known - entries:,} fewer: the two do not belong together"
        )


def _check_sense(folder: Path) -> float | None:
    """Bits per byte of a short text; None without a tokenizer or for models too large to load. Raises ArtifactError."""
    if not (folder / "tokenizer.json").is_file() or _is_large(folder):
        return None
    model = load_model(folder).eval()
    found = judge(lambda ids: model(input_ids=ids, use_cache=False).logits, load_tokenizer(folder))
    guess = math.log(model.config.vocab_size)
    if not found.loss <= WORSE_THAN_GUESSING * guess:
        raise ArtifactError(
            f"the model predicts plain English worse than guessing does ({found.loss:.2f} nats per token, a guess has "
            f"{guess:.2f}): its weights are damaged or under wrong names"
        )
    return found.bits_per_byte


def _is_large(folder: Path) -> bool:
    return sum(path.stat().st_size for path in weight_files(folder)) > PROBE_LIMIT_BYTES


def _difference(dense: Path, sparse: Path, seed: int) -> Difference | None:
    """Of the logits on random ids; None for models too large to load."""
    if _is_large(sparse):
        return None
    first, second = load_model(dense), load_model(sparse)
    ids = torch.randint(first.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(seed))
    return difference(exact_logits(first, ids), exact_logits(second, ids))
