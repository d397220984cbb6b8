"""A model of a run as a folder of its own with its card, while the stage runs or later (`launch.py export`)."""

import shutil
from pathlib import Path

from hpc.config import Finetune, Parallel, Pretrain, Relora
from hpc.errors import ArtifactError, ConfigError
from hpc.model.build import empty_model, load_config, model_config
from hpc.model.routing import PASSPORT
from hpc.report.card import CARD, card_of
from hpc.report.facts import MODELS
from hpc.report.gather import gather
from hpc.run.directory import RunDirectory, storage_errors
from hpc.run.receipt import read_receipt, verify
from hpc.run.task import TaskFile
from hpc.stages.common import copy_tokenizer_files, token_facts
from hpc.train.checkpoint import damage, published, step_of
from hpc.train.export import export_checkpoint

TRAINING = (Pretrain, Finetune, Relora)
"""Stages whose checkpoints hold a whole model."""


def export_stage(run: RunDirectory, name: str, out: Path, step: int | None) -> str:
    """Write `out` from a stage that makes a model, with a README.md about it; returns what was taken, in words.

    Of a training of all weights that is a checkpoint, by default the newest that verifies; once a stage is done and
    keeps none, and of every other stage, it is the artifact. Nothing in the run directory is changed. Raises
    ConfigError or ArtifactError when there is nothing to export.
    """
    if not run.stage(name).task.exists():
        raise ConfigError(f"{run.root} has no stage {name!r} that was ever started")
    task = TaskFile.read(run.stage(name).task)
    stage = task.stage
    if stage.produces not in MODELS:
        raise ConfigError(f"stage {name!r} is of kind {stage.kind}: only stages that make a model can be exported")
    if step is not None and not isinstance(stage, TRAINING):
        raise ConfigError(f"--step {step}: stage {name!r} is of kind {stage.kind}, its artifact is all there is of it")
    if out.exists():
        raise ConfigError(f"{out} is there already: name a new folder")
    staging = out.with_name(f".{out.name}.staging")
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        checkpoints = published(run.stage(name).checkpoints)
        is_done = run.stage(name).receipt.exists()
        if isinstance(stage, TRAINING) and (step is not None or checkpoints or not is_done):
            taken: int | None = _export_checkpoint(run, task, step, staging)
        else:
            taken = None
            _export_artifact(run, name, staging)
        facts = gather(run.root)
        (staging / CARD).write_text(card_of(facts, facts.stage(name), taken), encoding="utf-8")
        staging.rename(out)
    return f"{name} after {taken} steps" if taken is not None else f"{name}, as the stage left it"


def _export_artifact(run: RunDirectory, name: str, staging: Path) -> None:
    receipt = read_receipt(run.stage(name))
    if receipt is None:
        raise ArtifactError(f"stage {name!r} is not done: there is nothing to export before it has its receipt")
    verify(run.stage(name), receipt)
    shutil.copytree(run.stage(name).artifact, staging)


def _export_checkpoint(run: RunDirectory, task: TaskFile, step: int | None, staging: Path) -> int:
    """Put a checkpoint together as a transformers folder; returns its step."""
    stage = task.stage
    assert isinstance(stage, TRAINING)
    folder = _choose(run.stage(stage.name).checkpoints, step)
    kinds = {other.name: other.produces for other in task.stages}
    inputs = {kinds[need]: run.stage(need).artifact for need in reversed(stage.needs)}  # the first of each kind
    if isinstance(stage, Pretrain):
        made = stage.train
        facts = token_facts(inputs["tokens"])
        config = model_config(
            made.model, made.router, facts["vocab_size"], made.batches.seq_len, facts["end_of_text_id"]
        )
        tokenizer = inputs["tokens"] / "tokenizer"
    else:
        config = load_config(inputs["model"])
        tokenizer = inputs["model"]
    model = empty_model(config)
    if isinstance(stage, Relora):
        from hpc.adapt.lora import attach, base_name  # slow to load, and only needed here
        from hpc.adapt.relora import merge_in_place

        undivided = stage.train.model_copy(update={"parallel": Parallel()})
        export_checkpoint(folder, attach(model, undivided, seed=0), config, staging, merge_in_place, base_name)
    else:
        export_checkpoint(folder, model, config, staging)
    copy_tokenizer_files(tokenizer, staging)
    if (folder / PASSPORT).exists():
        shutil.copyfile(folder / PASSPORT, staging / PASSPORT)
    return step_of(folder)


def _choose(root: Path, step: int | None) -> Path:
    found = published(root)
    if step is not None:
        found = [path for path in found if step_of(path) == step]
    for folder in reversed(found):
        if damage(folder) is None:
            return folder
    there = ", ".join(str(step_of(path)) for path in published(root)) or "none"
    raise ArtifactError(
        f"{root} has no whole checkpoint{f' of step {step}' if step else ''} (there: {there}): a finished stage has "
        "its model in artifact/, and keeps checkpoints only for keep_every_steps"
    )
