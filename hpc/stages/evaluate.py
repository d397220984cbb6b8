"""Held-out loss of models on token sets, with the same code for all, and generated text. artifact/: results.json"""

import math
import time
from typing import Any

import torch

from hpc.config import Evaluate
from hpc.data.store import TokenStore
from hpc.data.tokenizer import load_tokenizer
from hpc.errors import ArtifactError
from hpc.evaluate.generate import continue_text
from hpc.evaluate.loss import held_out_loss
from hpc.run.directory import write_json
from hpc.run.task import Context, Result
from hpc.shrink.quantize import load_any_model
from hpc.stages.common import token_facts

BATCH_SIZE = 8
LONGEST = 1024
"""Tokens of a window, when the stage does not say and the model's context is longer."""


def run(context: Context) -> Result:
    """Do the stage. Raises ArtifactError when a model does not fit a token set."""
    stage = context.task.stage
    assert isinstance(stage, Evaluate)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    samples: dict[str, list[dict[str, str]]] = {}
    models = context.inputs("model", "quantized")
    for name, folder in models:
        context.check_budget()
        context.progress(f"loading {name}")
        model = load_any_model(folder).eval()
        table[name] = {}
        for set_name, tokens in context.inputs("tokens"):
            facts = token_facts(tokens)
            if facts["vocab_size"] > model.config.vocab_size:
                raise ArtifactError(
                    f"{name!r} has {model.config.vocab_size:,} vocabulary entries, {set_name!r} has "
                    f"{facts['vocab_size']:,}: let its prepare stage need the one with the model's tokenizer"
                )
            table[name][set_name] = _measure(
                context, stage, name, model, set_name, TokenStore(tokens / "held_out"), facts
            )
        context.progress(f"{name}: writing text")
        tokenizer = load_tokenizer(folder)
        samples[name] = [
            {
                "prompt": prompt,
                "text": continue_text(model, tokenizer, prompt, stage.generate_tokens, context.task.seed),
            }
            for prompt in stage.prompts
        ]
        del model
    context.directory.artifact.mkdir(parents=True)
    metrics = {"models": table, "samples": samples}
    write_json(context.directory.artifact / "results.json", metrics)
    return Result(
        metrics,
        {
            "models": "measured: held-out tokens of each set in windows of the context length, fp32; perplexity, "
            "bits_per_byte derived from loss",
            "samples": "measured: sampled with temperature 0.8, top-k 40, one seed",
        },
        {},
        ("torch", "transformers"),
    )


def _measure(
    context: Context, stage: Evaluate, name: str, model: Any, set_name: str, store: TokenStore, facts: dict[str, Any]
) -> dict[str, Any]:
    def forward(ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits

    began = time.monotonic()
    loss, tokens = held_out_loss(
        forward,
        [store],
        seq_len=stage.seq_len or min(LONGEST, model.config.max_position_embeddings),
        batch_size=BATCH_SIZE,
        max_tokens=stage.tokens,
        progress=lambda done, total: context.progress(f"{name} on {set_name}", done=done, total=total),
    )
    tokens_per_byte = facts["tokens_held_out"] / facts["bytes_held_out"]
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) * tokens_per_byte if store.answers is None else None,
        "tokens": tokens,
        "tokens_per_s": tokens / (time.monotonic() - began),
    }
