"""What the training stages begin and end with: their ranks; the model on disk, and the figures of their receipt."""

import math
import shutil
from pathlib import Path
from typing import Any

from hpc.config import TrainingBase
from hpc.data.loader import epochs
from hpc.model.build import save_model
from hpc.model.routing import PASSPORT
from hpc.run.directory import write_json
from hpc.run.task import Context, Result
from hpc.stages.common import copy_tokenizer_files
from hpc.train.allocator import give_back_freed_memory
from hpc.train.engine import pick_device, start_process_group
from hpc.train.fragments import Rename
from hpc.train.health import HEALTH_PROVENANCE
from hpc.train.loop import Job, Trained, on_first_rank
from hpc.train.watchdog import Watchdog


def begin_training(context: Context, settings: TrainingBase) -> Watchdog:
    """The process group, under a watchdog that knows more than a time-out of a collective tells. Collective."""
    give_back_freed_memory()
    watchdog = Watchdog.start(context, settings.health.hang)
    device = pick_device(context.task.machine.device)
    start_process_group(context.world, device, settings.health.hang.longest_s + 60)
    return watchdog


def write_trained(
    context: Context, trained: Trained, config: Any, tokenizer: Path, rename: Rename = str
) -> dict[str, object]:
    """Write all weights as a plain transformers folder with its tokenizer, and where tokens went. Collective.

    rename: from a parameter's name to that in the file; None for one that has no place there. Returns the census of
    the tensors written, on rank 0.
    """
    context.progress("writing the model")
    whole = trained.engine.state_in_transformers_layout()
    state = {known_as: value for name, value in whole.items() if (known_as := rename(name)) is not None}
    artifact = context.directory.artifact

    def write() -> dict[str, object]:
        staging = artifact.with_name(".artifact")
        shutil.rmtree(staging, ignore_errors=True)
        written = save_model(config, state, staging)
        copy_tokenizer_files(tokenizer, staging)
        if trained.passport is not None:
            write_json(staging / PASSPORT, trained.passport)
        staging.rename(artifact)
        return written

    return on_first_rank(context.world.is_first, write) or {}


def training_result(
    job: Job, trained: Trained, census: dict[str, object], more: dict[str, tuple[Any, str]], libraries: tuple[str, ...]
) -> Result:
    """The receipt's figures of a training stage. more: name -> (value, provenance) of what only some stages know."""
    settings = job.settings
    num_tokens = settings.steps * settings.batches.tokens_per_step
    seq_len = settings.batches.seq_len
    figures: dict[str, tuple[Any, str]] = {
        "heldout_loss": (trained.held_out_loss, "measured: all held-out tokens, nats per token"),
        "heldout_perplexity": (math.exp(trained.held_out_loss), "derived: exp(heldout_loss)"),
        "train_loss": (trained.last_loss, "measured: last step, mean over ranks"),
        "steps": (settings.steps, "measured: optimizer steps done"),
        "tokens": (num_tokens, "derived: steps x tokens_per_step"),
        **more,
        "tokens_per_s": (trained.tokens_per_s, "measured: median step of the last attempt"),
        "epochs": (
            epochs(job.train_tokens, seq_len, num_tokens // seq_len),
            "derived: sequences read / sequences there are, of each source",
        ),
        "replayed_steps": (
            trained.replayed_steps, "measured: steps done again after a lost attempt or a return to a checkpoint"
        ),
        "seq_len": (seq_len, "derived: from the configuration"),
    }  # fmt: skip
    if job.measure_before:
        before = (trained.held_out_loss_before, "measured: before the first step, all held-out tokens")
        figures = {"heldout_loss_before": before, **figures}
    metrics = {name: value for name, (value, _) in figures.items()} | trained.health
    provenance = {name: source for name, (_, source) in figures.items()} | HEALTH_PROVENANCE
    return Result(metrics, provenance, census, libraries, trained.checkpoints.clear)
