"""Adapters for one task on a frozen model. artifact/: a peft adapter folder with the hash of its base."""

import math
import shutil

from hpc.adapt.lora import attach, save_adapter, trainable_parameters
from hpc.config import Lora
from hpc.data.loader import epochs
from hpc.model.build import load_model
from hpc.run.directory import write_json
from hpc.run.task import Context, Result
from hpc.stages.common import mixture
from hpc.train.engine import pick_device, start_process_group
from hpc.train.health import HEALTH_PROVENANCE
from hpc.train.loop import Job, on_first_rank, train
from hpc.train.watchdog import Watchdog

BASE_FILE = "base.json"
"""Says which model an adapter belongs to; `merge` refuses another one."""


def run(context: Context) -> Result:
    """Do the stage on every rank."""
    stage = context.task.stage
    assert isinstance(stage, Lora)
    settings = stage.train
    watchdog = Watchdog.start(context, settings.health.hang)
    timeout_s = settings.health.hang.longest_s + 60
    start_process_group(context.world, pick_device(context.task.machine.device), timeout_s)
    base_name, base = context.inputs("model")[0]
    train_tokens, held_out_tokens = mixture(context, settings)
    model = load_model(base)
    top_k = int(model.config.num_experts_per_tok)
    total = model.num_parameters()
    adapted = attach(model, settings, context.task.seed)
    trainable = trainable_parameters(adapted)
    job = Job(
        model=adapted,
        settings=settings,
        watchdog=watchdog,
        top_k=top_k,
        aux_loss=0.0,  # routers are frozen
        train_tokens=train_tokens,
        held_out_tokens=held_out_tokens,
        measure_before=True,
    )
    trained = train(context, job)

    def write() -> None:
        staging = context.directory.artifact.with_name(".artifact")
        shutil.rmtree(staging, ignore_errors=True)
        save_adapter(trained.engine.module, staging)
        write_json(staging / BASE_FILE, {"stage": base_name, "digest": context.input_receipt(base_name).digest})
        staging.rename(context.directory.artifact)

    on_first_rank(context.world.is_first, write)
    num_tokens = settings.steps * settings.batches.tokens_per_step
    metrics = {
        "heldout_loss_before": trained.held_out_loss_before,
        "heldout_loss": trained.held_out_loss,
        "heldout_perplexity": math.exp(trained.held_out_loss),
        "train_loss": trained.last_loss,
        "steps": settings.steps,
        "tokens": num_tokens,
        "trainable_params": trainable,
        "total_params": total,
        "tokens_per_s": trained.tokens_per_s,
        "epochs": epochs(train_tokens, settings.batches.seq_len, num_tokens // settings.batches.seq_len),
        "replayed_steps": trained.replayed_steps,
        **trained.health,
    }
    provenance = {
        "heldout_loss_before": "measured: the base model, all held-out tokens of this task",
        "heldout_loss": "measured: all held-out tokens of this task, nats per token",
        "heldout_perplexity": "derived: exp(heldout_loss)",
        "train_loss": "measured: last step, mean over ranks",
        "steps": "measured: optimizer steps done",
        "tokens": "derived: steps x tokens_per_step",
        "trainable_params": "measured: counted over the adapters",
        "total_params": "measured: counted over the base model",
        "tokens_per_s": "measured: median step of the last attempt",
        "epochs": "derived: sequences read / sequences there are, of each source",
        "replayed_steps": "measured: steps done again after a lost attempt or a return to a checkpoint",
        **HEALTH_PROVENANCE,
    }
    return Result(metrics, provenance, {}, ("torch", "deepspeed", "transformers", "peft"), trained.checkpoints.clear)
