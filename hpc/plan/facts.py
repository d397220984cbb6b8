"""What is known about the model that a stage reads or makes, before anything is loaded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.config import Machine, Model, Prepare, Pretrain, Reuse, Router, RunConfig, Stage, TrainingBase
from hpc.config.stages import Tokenizer
from hpc.plan.params import Parameters, count
from hpc.plan.reused import pretrained_config, reused_config, shape_of


@dataclass(frozen=True)
class Facts:
    """The model of a stage."""

    model: Model
    router: Router
    parameters: Parameters
    vocab_size: int
    seq_len: int


def model_facts(config: RunConfig, name: str) -> Facts | None:
    """What is known about the model of a stage; None when it has none, or its size cannot be read here."""
    return all_facts(config)[name]


def all_facts(config: RunConfig) -> dict[str, Facts | None]:
    """Stage -> facts, in the order in which stages can run."""
    facts: dict[str, Facts | None] = {}
    reused: dict[str, dict[str, Any] | None] = {}
    for stage in config.ordered():
        if isinstance(stage, Reuse):
            reused[stage.name] = found = reused_config(
                config, stage, reused.get(stage.needs[0]) if stage.needs else None
            )
            shape = shape_of(found) if found is not None else None
            facts[stage.name] = Facts(*shape) if shape else None
        else:
            facts[stage.name] = known = _facts(config, stage, facts)
            if isinstance(stage, Pretrain) and known:
                made = known.model, known.router, known.vocab_size, known.seq_len
                reused[stage.name] = pretrained_config(*made)
    return facts


def _facts(config: RunConfig, stage: Stage, facts: dict[str, Facts | None]) -> Facts | None:
    """The model of a stage: its own shape when it pretrains, else that of the first model or adapter it needs."""
    if isinstance(stage, Pretrain):
        vocab_size = _vocab_size(config, config.needed(stage, ["tokens"])[0])
        if vocab_size is None:
            return None
        training = stage.train
        parameters = count(training.model, training.router, vocab_size)
        return Facts(training.model, training.router, parameters, vocab_size, training.batches.seq_len)
    found = config.needed(stage, ["model", "adapter", "quantized", "exported"])
    return facts[found[0].name] if found else None


def _vocab_size(config: RunConfig, stage: Stage) -> int | None:
    """Vocabulary of a prepare stage; None when its tokenizer cannot be read here."""
    assert isinstance(stage, Prepare)
    if stage.needs:
        source = config.stage(stage.needs[0])
        return _vocab_size(config, source) if isinstance(source, Prepare) else None
    tokenizer = stage.tokenizer or Tokenizer()
    if tokenizer.path is None:
        return tokenizer.vocab_size
    try:
        content = json.loads((Path(tokenizer.path) / "tokenizer.json").read_text(encoding="utf-8"))
        return len(content["model"]["vocab"]) + sum(
            token["content"] not in content["model"]["vocab"] for token in content.get("added_tokens", [])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def compute_precision(machine: Machine, settings: TrainingBase) -> str:
    """fp32 or bf16, as far as it can be told before the run."""
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if machine.device == "cuda" else "fp32"
