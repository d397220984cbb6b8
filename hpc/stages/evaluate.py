"""Held-out loss of models on token sets, with the same code for all, and generated text. artifact/: results.json"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc.config import Evaluate
from hpc.data.store import TokenStore
from hpc.errors import ArtifactError
from hpc.evaluate.generate import continue_text
from hpc.evaluate.harness import ask
from hpc.evaluate.loss import by_document, held_out_loss
from hpc.evaluate.speed import Writing, joules_per_token, write_for_a_while
from hpc.run.directory import write_json
from hpc.run.task import Context, Result
from hpc.runtimes.artifact import locate
from hpc.runtimes.hugging_face import Transformers
from hpc.runtimes.remote import Remote
from hpc.runtimes.runner import Runner
from hpc.shrink.gguf_file import context_length
from hpc.stages.common import token_facts

BATCH_SIZE = 8
SAMPLED_AFTER_S = 1.5
"""By then the node's sampler, which looks once a second, has written what the last model drew."""
LONGEST = 1024
"""Tokens of a window, when the stage does not say and the model's context is longer."""


def run(context: Context) -> Result:
    """Do the stage. Raises ArtifactError when a model does not fit a token set, or its runtime refuses it."""
    stage = context.task.stage
    assert isinstance(stage, Evaluate)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    samples: dict[str, list[dict[str, str]]] = {}
    runtimes: dict[str, dict[str, Any]] = {}
    writings: dict[str, Writing] = {}
    answers: dict[str, dict[str, dict[str, float]]] = {}
    for name, folder in context.inputs("model", "quantized", "exported"):
        context.check_budget()
        context.progress(f"loading {name}")
        longest = stage.seq_len or _context_length(folder)
        runtime, _ = locate(folder)
        with _opened(folder, longest) as model:
            table[name] = {
                set_name: _measure(context, stage, (name, model), (set_name, tokens), longest)
                for set_name, tokens in context.inputs("tokens")
            }
            if stage.tasks:
                context.progress(f"{name}: {', '.join(Path(task).stem for task in stage.tasks)}")
                end = token_facts(context.inputs("tokens")[0][1])["end_of_text_id"]
                answers[name] = ask(model, stage.tasks, longest, end, stage.task_examples)
            context.progress(f"{name}: writing text")
            samples[name] = [
                {"prompt": prompt, "text": continue_text(model, prompt, stage.generate_tokens, context.task.seed)}
                for prompt in stage.prompts
            ]
            writings[name] = write_for_a_while(model, stage.prompts[0], longest, stage.timed_seconds)
            runtimes[name] = {
                "runtime": runtime,
                "memory_bytes": model.memory_bytes(),
                "tokens_per_s": writings[name].tokens_per_s,
            }
    if stage.timed_seconds:
        time.sleep(SAMPLED_AFTER_S)
    for name, writing in writings.items():
        runtimes[name]["j_per_token"] = joules_per_token(context.directory.root, context.attempt, writing)
    context.directory.artifact.mkdir(parents=True)
    metrics = {"models": table, "tasks": answers, "samples": samples, "runtimes": runtimes}
    write_json(context.directory.artifact / "results.json", metrics)
    return Result(
        metrics,
        {
            "models": "measured: held-out tokens of each set in windows of the context length, no document sees "
            "another, by the artifact's runtime (transformers: fp32); perplexity, bits_per_byte derived",
            "tasks": "measured: lm-eval, every model by its own runtime",
            "samples": "measured: sampled with temperature 0.8, top-k 40, one seed, by the artifact's runtime",
            "runtimes": f"measured: {stage.timed_seconds:g} s of writing one answer at a time; j_per_token: the node's "
            "joules in that time by its samplers, per new token; memory_bytes: weights, as the runtime counts them",
        },
        {},
        ("torch", "transformers", *(["lm-eval"] if stage.tasks else [])),
    )


def _context_length(folder: Path) -> int:
    runtime, path = locate(folder)
    if runtime == "llama.cpp":
        return min(LONGEST, context_length(path))
    config = folder / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return min(LONGEST, content.get("max_position_embeddings") or LONGEST)


@contextmanager
def _opened(folder: Path, context_length: int) -> Iterator[Runner]:
    """A model in its runtime: transformers in this process, which has it loaded, others in a process of their own."""
    if locate(folder)[0] == "transformers":
        yield Transformers(folder)
        return
    with Remote(folder, context_length) as model:
        yield model


def _measure(
    context: Context, stage: Evaluate, named_model: tuple[str, Runner], named_tokens: tuple[str, Path], seq_len: int
) -> dict[str, Any]:
    (name, model), (set_name, tokens) = named_model, named_tokens
    facts, store = token_facts(tokens), TokenStore(tokens / "held_out")
    if facts["vocab_size"] > model.vocab_size:
        raise ArtifactError(
            f"{name!r} has {model.vocab_size:,} vocabulary entries, {set_name!r} has {facts['vocab_size']:,}: let its "
            "prepare stage need the one with the model's tokenizer"
        )
    began = time.monotonic()
    loss, count = held_out_loss(
        model.batch_logits if isinstance(model, Transformers) else by_document(model.logits),
        [store],
        seq_len=seq_len,
        batch_size=BATCH_SIZE if isinstance(model, Transformers) else 1,
        max_tokens=stage.tokens,
        progress=lambda done, total: context.progress(f"{name} on {set_name}", done=done, total=total),
    )
    tokens_per_byte = facts["tokens_held_out"] / facts["bytes_held_out"]
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) * tokens_per_byte if store.answers is None else None,
        "tokens": count,
        "tokens_per_s": count / (time.monotonic() - began),
    }
