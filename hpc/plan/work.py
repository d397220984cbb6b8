"""How much there is to do in a stage: tokens, FLOPs, bytes of text."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hpc.config import AdapterTraining, Evaluate, Lora, Prepare, RunConfig, Stage, TrainingBase, Trains
from hpc.plan.facts import Facts
from hpc.plan.flops import adapter_flops_per_token, forward_flops_per_token, training_flops_per_token
from hpc.plan.quantity import Quantity, unknown

BYTES_PER_TOKEN = 4.4
"""English through a byte-level BPE of a few thousand entries, measured on the quickstart's text."""


@dataclass(frozen=True)
class Work:
    """Of one stage."""

    flops: Quantity
    """Model FLOPs of training, or of an evaluation stage's forward passes; what is recomputed does not count."""
    tokens: int | None
    held_out_flops: float = 0.0
    """Forward passes over held-out text while a training stage runs, and after it; not in `flops`."""
    notes: tuple[str, ...] = ()


def work(config: RunConfig, stage: Stage, facts: Facts | None) -> Work:
    """FLOPs and tokens of a stage."""
    nothing = Quantity(0.0, "FLOP", "derived: none to speak of")
    if isinstance(stage, Prepare):
        return Work(nothing, None)
    if facts is None:
        return Work(unknown("FLOP", "the model's size is not known yet"), None)
    if isinstance(stage, Trains):
        return _training(config, stage, facts)
    if isinstance(stage, Evaluate):
        held_out = [_held_out_tokens(source, stage.tokens) for source in config.needed(stage, ["tokens"])]
        known = [tokens for tokens in held_out if tokens is not None]
        if len(known) < len(held_out):
            return Work(unknown("FLOP", "the held-out text is not here"), None)
        tokens = sum(known) * len(config.needed(stage, ["model", "quantized", "exported"]))
        flops = tokens * forward_flops_per_token(facts.model, facts.router, facts.vocab_size, facts.seq_len)
        return Work(Quantity(flops, "FLOP", "estimated: forward passes over text at 4.4 bytes a token"), tokens)
    return Work(nothing, None)


def flops_per_token(facts: Facts, settings: TrainingBase) -> float:
    """Model FLOPs of one token in training, forward and backward."""
    shape = (facts.model, facts.router, facts.vocab_size, settings.batches.seq_len)
    if isinstance(settings, AdapterTraining):
        return adapter_flops_per_token(*shape, settings)
    return training_flops_per_token(*shape)


def _training(config: RunConfig, stage: Trains, facts: Facts) -> Work:
    settings: TrainingBase = stage.train
    tokens = settings.steps * settings.batches.tokens_per_step
    texts = config.needed(stage, ["tokens"])
    held_out = [_held_out_tokens(text, None) for text in texts]
    everything = sum(filter(None, held_out))
    now_and_then = (1 + settings.steps // settings.evaluate_every_steps) * settings.evaluate_tokens
    whole = everything * (2 if isinstance(stage, Lora) else 1)  # adapters: before the first step and after the last
    forward = forward_flops_per_token(facts.model, facts.router, facts.vocab_size, settings.batches.seq_len)
    return Work(
        Quantity(tokens * flops_per_token(facts, settings), "FLOP", "derived: tokens x FLOPs per token"),
        tokens,
        (now_and_then + whole) * forward,
        tuple(_epochs(settings, tokens, texts)),
    )


def _epochs(settings: TrainingBase, tokens: int, texts: list[Stage]) -> Iterator[str]:
    """How often a training stage goes through each of its texts."""
    weights = [settings.mixture.get(text.name, 1.0) for text in texts]
    for text, weight in zip(texts, weights, strict=True):
        size = text_bytes(text)
        if size is not None:
            share = weight / sum(weights)
            of = "its text" if len(texts) == 1 else text.name
            yield f"about {share * tokens / (size / BYTES_PER_TOKEN):.2f} epochs of {of} (estimated)"


def _held_out_tokens(stage: Stage, limit: int | None) -> int | None:
    """Held-out tokens of a prepare stage, at most `limit`; None when its text is not here."""
    assert isinstance(stage, Prepare)
    text = text_bytes(stage)
    if text is None:
        return limit
    tokens = round(text * stage.held_out_fraction / BYTES_PER_TOKEN)
    return tokens if limit is None else min(limit, tokens)


def text_bytes(stage: Stage) -> int | None:
    """Size of a prepare stage's text where that can be seen without reading it."""
    assert isinstance(stage, Prepare)
    total = 0
    for source in stage.sources:
        folder = ""
        if source.module:
            module = find_spec(source.module.split(":")[0])
            if module is None or module.origin is None or not Path(module.origin).is_file():
                return None
            total += Path(module.origin).stat().st_size
        if source.package:
            spec = find_spec(source.package)
            if spec is None or not spec.submodule_search_locations:
                return None
            folder = spec.submodule_search_locations[0] + "/"
        for pattern in source.files:
            total += sum(Path(name).stat().st_size for name in glob.glob(folder + pattern, recursive=True))
    return total or None
