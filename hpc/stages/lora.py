"""Adapters for one task on a frozen model. artifact/: a peft adapter folder with the hash of its base.

With `base_bits: 4` that model is held in four bits while they learn. The artifact is the same: an adapter for the base
in full precision, into which `merge` folds it. It has seen the rounded one, and made up for some of its rounding: what
comes of it beside the other is for `evaluate` to say.
"""

import shutil

from hpc.adapt.lora import attach, base_name, choose_experts, save_adapter, trainable_parameters
from hpc.config import Lora
from hpc.config.model import Balance
from hpc.model.build import empty_model, load_config
from hpc.model.packing import bits_per_weight
from hpc.reuse.stored import StoredModel
from hpc.run.directory import write_json
from hpc.run.task import Context, Result
from hpc.stages.common import BASE_FILE, check_fit, experts_of, experts_per_token, mixture
from hpc.stages.training import begin_training, training_result
from hpc.train.loop import Job, on_first_rank, train

PROBE_IDS = 64
"""Held-out ids of each text that go along."""


def run(context: Context) -> Result:
    """Do the stage on every rank."""
    stage = context.task.stage
    assert isinstance(stage, Lora)
    settings = stage.train
    name, base = context.inputs("model")[0]
    config = load_config(base)
    check_fit(context, config, settings)
    watchdog = begin_training(context, settings)
    train_tokens, held_out_tokens = mixture(context, settings)
    model = empty_model(config)
    total = model.num_parameters()
    chosen = choose_experts(settings.expert_choice, base, experts_of(config)) if settings.expert_choice else None
    adapted = attach(model, settings, context.task.seed, context.world.rank, chosen)
    trainable = trainable_parameters(adapted, settings.parallel.expert_parallel_size)
    job = Job(
        model=adapted,
        settings=settings,
        watchdog=watchdog,
        top_k=experts_per_token(config),
        balance=Balance(aux_loss=0.0),  # routers are frozen
        train_tokens=train_tokens,
        held_out_tokens=held_out_tokens,
        weights=StoredModel(base),
        rename=base_name,
        measure_before=True,
    )
    trained = train(context, job)

    state = trained.engine.trained_state()

    def write() -> None:
        staging = context.directory.artifact.with_name(".artifact")
        shutil.rmtree(staging, ignore_errors=True)
        save_adapter(state, settings, staging, has_experts=job.top_k > 0)
        ids = [store.tokens[:PROBE_IDS].tolist() for store in held_out_tokens]
        write_json(
            staging / BASE_FILE,
            {"stage": name, "digest": context.input_receipt(name).digest, "held_out_ids": ids},
        )
        staging.rename(context.directory.artifact)

    on_first_rank(context.world.is_first, write)
    shape = {
        "trainable_params": (trainable, "measured: counted over the adapters"),
        "base_bits": (settings.base_bits, "derived: from the configuration; null is full precision"),
        "base_bits_per_weight": (
            bits_per_weight(trained.engine.module),
            "measured: bytes of packed matrices on rank 0, null where nothing is packed",
        ),
        "total_params": (total, "measured: counted over the base model"),
    }
    libraries = ("torch", "deepspeed", "transformers", "peft", *(("bitsandbytes",) if settings.base_bits else ()))
    return training_result(job, trained, {}, shape, libraries)
