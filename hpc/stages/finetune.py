"""All weights of a model that exists, trained further. artifact/: a plain transformers folder with its tokenizer."""

from hpc.config import Finetune
from hpc.model.build import empty_model, load_config
from hpc.plan.flops import training_flops_per_token
from hpc.plan.reused import shape_of
from hpc.reuse.stored import StoredModel
from hpc.run.task import Context, Result
from hpc.stages.common import check_fit, experts_per_token, mixture
from hpc.stages.training import begin_training, training_result, write_trained
from hpc.train.loop import Job, train


def run(context: Context) -> Result:
    """Do the stage on every rank. No rank holds the whole model while it is loaded."""
    stage = context.task.stage
    assert isinstance(stage, Finetune)
    settings = stage.train
    folder = context.inputs("model")[0][1]
    config = load_config(folder)
    check_fit(context, config, settings)
    watchdog = begin_training(context, settings)
    train_tokens, held_out_tokens = mixture(context, settings)
    model = empty_model(config)
    total = model.num_parameters()
    shape = shape_of(config.to_dict())
    flops_per_token = shape and training_flops_per_token(shape[0], shape[1], shape[3], settings.batches.seq_len)
    job = Job(
        model=model,
        settings=settings,
        watchdog=watchdog,
        top_k=experts_per_token(config),
        balance=settings.balance,
        train_tokens=train_tokens,
        held_out_tokens=held_out_tokens,
        weights=StoredModel(folder),
        flops_per_token=flops_per_token,
        measure_before=True,
    )
    trained = train(context, job)
    census = write_trained(context, trained, config, folder)
    num_tokens = settings.steps * settings.batches.tokens_per_step
    figures = {
        "total_params": (total, "measured: counted over the model"),
        "flops": (
            flops_per_token and num_tokens * flops_per_token,
            "derived: model FLOPs of forward and backward, formula in hpc/plan/flops.py"
            if flops_per_token
            else "unknown: hpc/plan has no formula for this architecture",
        ),
    }
    return training_result(job, trained, census, figures, ("torch", "deepspeed", "transformers"))
