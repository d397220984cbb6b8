"""A mixture-of-experts model from random weights. artifact/: a plain transformers folder with its tokenizer."""

import math
import shutil
from pathlib import Path

from hpc.config import Pretrain
from hpc.data.loader import epochs
from hpc.model.build import build_model, model_config, save_model
from hpc.model.routing import PASSPORT
from hpc.plan.flops import training_flops_per_token
from hpc.plan.params import count
from hpc.run.directory import write_json
from hpc.run.task import Context, Result
from hpc.stages.common import copy_tokenizer_files, mixture, token_facts
from hpc.train.engine import pick_device, start_process_group
from hpc.train.health import HEALTH_PROVENANCE
from hpc.train.loop import Job, on_first_rank, train
from hpc.train.watchdog import Watchdog


def run(context: Context) -> Result:
    """Do the stage on every rank."""
    stage = context.task.stage
    assert isinstance(stage, Pretrain)
    settings = stage.train
    watchdog = Watchdog.start(context, settings.health.hang)
    timeout_s = settings.health.hang.longest_s + 60
    start_process_group(context.world, pick_device(context.task.machine.device), timeout_s)
    tokens = context.inputs("tokens")[0][1]
    facts = token_facts(tokens)
    config = model_config(
        settings.model, settings.router, facts["vocab_size"], settings.batches.seq_len, facts["end_of_text_id"]
    )
    train_tokens, held_out_tokens = mixture(context, settings)
    flops_per_token = training_flops_per_token(
        settings.model, settings.router, facts["vocab_size"], settings.batches.seq_len
    )
    job = Job(
        model=build_model(config, context.task.seed, settings.model.initialization),
        settings=settings,
        watchdog=watchdog,
        top_k=settings.router.top_k,
        aux_loss=settings.router.aux_loss,
        train_tokens=train_tokens,
        held_out_tokens=held_out_tokens,
        z_loss=settings.router.z_loss,
        balance_over_step=settings.router.aux_loss_over == "step",
        bias_update_rate=settings.router.bias_update_rate,
        flops_per_token=flops_per_token,
    )
    trained = train(context, job)

    context.progress("writing the model")
    state = trained.engine.state_in_transformers_layout()
    artifact = context.directory.artifact

    def write() -> dict[str, object]:
        staging = artifact.with_name(".artifact")
        shutil.rmtree(staging, ignore_errors=True)
        written = save_model(config, state, staging)
        copy_tokenizer_files(tokens / "tokenizer", staging)
        write_json(staging / PASSPORT, trained.passport)
        Path(staging).rename(artifact)
        return written

    census = on_first_rank(context.world.is_first, write)
    parameters = count(settings.model, settings.router, facts["vocab_size"])
    num_tokens = settings.steps * settings.batches.tokens_per_step
    metrics = {
        "heldout_loss": trained.held_out_loss,
        "heldout_perplexity": math.exp(trained.held_out_loss),
        "train_loss": trained.last_loss,
        "steps": settings.steps,
        "tokens": num_tokens,
        "total_params": parameters.total,
        "active_params": parameters.active,
        "flops": num_tokens * flops_per_token,
        "tokens_per_s": trained.tokens_per_s,
        "epochs": epochs(train_tokens, settings.batches.seq_len, num_tokens // settings.batches.seq_len),
        "replayed_steps": trained.replayed_steps,
        **trained.health,
        "seq_len": settings.batches.seq_len,
    }
    provenance = {
        "heldout_loss": "measured: all held-out tokens, nats per token",
        "heldout_perplexity": "derived: exp(heldout_loss)",
        "train_loss": "measured: last step, mean over ranks",
        "steps": "measured: optimizer steps done",
        "tokens": "derived: steps x tokens_per_step",
        "total_params": "derived: from the model's shape",
        "active_params": "derived: from the model's shape, parameters one token uses",
        "flops": "derived: model FLOPs of forward and backward, formula in hpc/plan/flops.py",
        "tokens_per_s": "measured: median step of the last attempt",
        "epochs": "derived: sequences read / sequences there are, of each source",
        "replayed_steps": "measured: steps done again after a lost attempt or a return to a checkpoint",
        **HEALTH_PROVENANCE,
        "seq_len": "derived: from the configuration",
    }
    return Result(metrics, provenance, census or {}, ("torch", "deepspeed", "transformers"), trained.checkpoints.clear)
