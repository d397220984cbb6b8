"""A mixture-of-experts model from random weights. artifact/: a plain transformers folder with its tokenizer."""

from hpc.config import Pretrain
from hpc.model.build import build_model, model_config
from hpc.plan.flops import training_flops_per_token
from hpc.plan.params import count
from hpc.run.task import Context, Result
from hpc.stages.common import mixture, token_facts
from hpc.stages.training import begin_training, training_result, write_trained
from hpc.train.loop import Job, train


def run(context: Context) -> Result:
    """Do the stage on every rank."""
    stage = context.task.stage
    assert isinstance(stage, Pretrain)
    settings = stage.train
    watchdog = begin_training(context, settings)
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
        balance=settings.router,
        train_tokens=train_tokens,
        held_out_tokens=held_out_tokens,
        flops_per_token=flops_per_token,
    )
    trained = train(context, job)
    census = write_trained(context, trained, config, tokens / "tokenizer")
    parameters = count(settings.model, settings.router, facts["vocab_size"])
    shape = {
        "total_params": (parameters.total, "derived: from the model's shape"),
        "active_params": (parameters.active, "derived: from the model's shape, parameters one token uses"),
        "flops": (
            settings.steps * settings.batches.tokens_per_step * flops_per_token,
            "derived: model FLOPs of forward and backward, formula in hpc/plan/flops.py",
        ),
    }
    return training_result(job, trained, census, shape, ("torch", "deepspeed", "transformers"))
