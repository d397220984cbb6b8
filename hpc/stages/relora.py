"""A model trained further by low-rank updates that add up. artifact/: a transformers folder with its tokenizer."""

from typing import Any

from hpc.adapt.lora import attach, base_name, choose_experts, train_unadapted, trainable_parameters
from hpc.adapt.relora import restart
from hpc.config import Relora
from hpc.model.build import empty_model, load_config
from hpc.reuse.stored import StoredModel
from hpc.run.task import Context, Result
from hpc.stages.common import check_fit, experts_of, experts_per_token, mixture
from hpc.stages.training import begin_training, training_result, write_trained
from hpc.train.engine import Engine
from hpc.train.loop import Job, train


def run(context: Context) -> Result:
    """Do the stage on every rank."""
    stage, seed = context.task.stage, context.task.seed
    assert isinstance(stage, Relora)
    settings = stage.train
    folder = context.inputs("model")[0][1]
    config = load_config(folder)
    check_fit(context, config, settings)
    watchdog = begin_training(context, settings)
    train_tokens, held_out_tokens = mixture(context, settings)
    model = empty_model(config)
    total = model.num_parameters()
    chosen = choose_experts(settings.expert_choice, folder, experts_of(config)) if settings.expert_choice else None
    adapted = attach(model, settings, seed, context.world.rank, chosen)
    train_unadapted(adapted)

    def end_cycle(engine: Engine, done: int) -> dict[str, Any]:
        return restart(engine, done, seed, settings.prune, settings.prune_ratio)

    job = Job(
        model=adapted,
        settings=settings,
        watchdog=watchdog,
        top_k=experts_per_token(config),
        balance=settings.balance,
        train_tokens=train_tokens,
        held_out_tokens=held_out_tokens,
        weights=StoredModel(folder),
        rename=base_name,
        restart=end_cycle,
        measure_before=True,
    )
    trainable = trainable_parameters(adapted, settings.parallel.expert_parallel_size)
    trained = train(context, job)
    census = write_trained(context, trained, config, folder, base_name)
    shape = {
        "trainable_params": (trainable, "measured: counted over adapters and what has none"),
        "total_params": (total, "measured: counted over the model"),
    }
    return training_result(job, trained, census, shape, ("torch", "deepspeed", "transformers", "peft"))
