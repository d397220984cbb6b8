"""A checkpoint of a pretraining stage as a model folder, while the stage runs or later (`launch.py export`)."""

import shutil
from pathlib import Path

from hpc.config import Pretrain
from hpc.errors import ArtifactError, ConfigError
from hpc.model.build import model_config
from hpc.model.routing import PASSPORT
from hpc.run.directory import RunDirectory, storage_errors
from hpc.run.task import TaskFile
from hpc.stages.common import copy_tokenizer_files, token_facts
from hpc.train.checkpoint import damage, published, step_of
from hpc.train.export import export_checkpoint


def export_stage(run: RunDirectory, name: str, out: Path, step: int | None) -> int:
    """Write `out` from a checkpoint of a stage, by default the newest that verifies; returns the checkpoint's step.

    Nothing in the run directory is changed. Raises ConfigError or ArtifactError when there is nothing to export.
    """
    if not run.stage(name).task.exists():
        raise ConfigError(f"{run.root} has no stage {name!r} that was ever started")
    task = TaskFile.read(run.stage(name).task)
    stage = task.stage
    if not isinstance(stage, Pretrain):
        raise ConfigError(f"stage {name!r} is of kind {stage.kind}: only checkpoints of pretraining hold a whole model")
    if out.exists():
        raise ConfigError(f"{out} is there already: name a new folder")
    folder = _choose(run.stage(name).checkpoints, step)
    kinds = {other.name: other.produces for other in task.stages}
    tokens = next(run.stage(need).artifact for need in stage.needs if kinds[need] == "tokens")
    facts = token_facts(tokens)
    config = model_config(
        stage.train.model, stage.train.router, facts["vocab_size"], stage.train.batches.seq_len, facts["end_of_text_id"]
    )
    staging = out.with_name(f".{out.name}.staging")
    with storage_errors(out):
        shutil.rmtree(staging, ignore_errors=True)
        export_checkpoint(folder, config, staging)
        copy_tokenizer_files(tokens / "tokenizer", staging)
        if (folder / PASSPORT).exists():
            shutil.copyfile(folder / PASSPORT, staging / PASSPORT)
        staging.rename(out)
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
