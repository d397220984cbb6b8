"""The card of a model: README.md as the Hugging Face Hub reads it, with its energy and where every figure comes from.

Front matter: https://huggingface.co/docs/hub/model-cards and .../model-cards-co2. A key whose value is not known is
left out: no licence is made up, and `co2_eq_emissions` (grams) is there only when every site that the model's stages
ran on states a carbon intensity and every node reported its joules.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from hpc.config.near import nearest
from hpc.energy.footprint import NAMES
from hpc.errors import ConfigError
from hpc.plan.quantity import amount
from hpc.report import account, words
from hpc.report.facts import MODELS, RunFacts, StageFacts, total
from hpc.report.gather import gather

CARD = "README.md"


def has_card(stage: StageFacts) -> bool:
    """Whether a stage left weights that a card can be about."""
    return stage.produces in MODELS and stage.state == "done"


def write_card(root: Path, name: str) -> str:
    """The card of a finished stage of a run. Raises ConfigError when the stage has no model."""
    run = gather(root)
    names = [stage.name for stage in run.chain]
    if name not in names:
        raise ConfigError(f"there is no stage {name!r} in this chain{nearest(name, names)}")
    stage = run.stage(name)
    if not has_card(stage):
        why = f"it is {stage.state}" if stage.produces in MODELS else f"a {stage.kind} stage leaves {stage.produces}"
        ready = ", ".join(one.name for one in run.chain if has_card(one)) or "none yet"
        raise ConfigError(f"stage {name!r} has no model to describe ({why}); models of this run: {ready}")
    return card_of(run, stage)


def card_of(run: RunFacts, stage: StageFacts, step: int | None = None) -> str:
    """The card as text. step: it is about the checkpoint after that step, not about the finished stage."""
    if step is not None and stage.state == "done" and step == settings(run, stage).get("steps"):
        step = None
    environment = Environment(
        loader=PackageLoader("hpc.report", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=False,  # it is Markdown: `cell` escapes what comes from elsewhere
    )  # fmt: skip
    environment.filters.update(
        cell=cell, joules=words.joules, seconds=words.seconds, figure=words.show, megabytes=words.megabytes,
        kilograms=words.kilograms, amount=amount,
    )  # fmt: skip
    text = environment.get_template("card.md.j2").render(
        run=run,
        stage=stage,
        step=step,
        lineage=run.lineage(stage),
        shape=shape(run, stage),
        evaluation=evaluation(run, stage) if step is None else {},
        checkpoint=_row_at(stage, step),
        settings={one.name: settings(run, one) for one in run.lineage(stage)},
        lineage_j=total([one.energy_j for one in run.lineage(stage)]),
        missing=missing(run, stage),
        footprints=[one for one in account.footprints(_only(run, stage)) if one["part"]],
        emissions=emissions(run, stage) if step is None else None,
    )
    front = yaml.safe_dump(front_matter(run, stage, step), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n{text.strip()}\n"


def front_matter(run: RunFacts, stage: StageFacts, step: int | None) -> dict[str, Any]:
    """The YAML on top."""
    facts: dict[str, Any] = {
        "library_name": "peft" if stage.produces == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags(run, stage),
    }
    rows = evaluation(run, stage) if step is None else {}
    if rows:
        facts["model-index"] = [
            {
                "name": f"{run.name}-{stage.name}",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": f"{name} (held out)", "type": name},
                        "metrics": [{"type": "perplexity", "value": round(values["perplexity"], 3)}],
                    }
                    for name, values in rows.items()
                ],
            }
        ]
    grams = emissions(run, stage) if step is None else None
    if grams is not None:
        facts["co2_eq_emissions"] = grams
    return facts


TRAINING_TYPES = (
    ("pretrain", "pre-training"), ("relora", "pre-training by low-rank updates"), ("finetune", "full fine-tuning"),
    ("lora", "fine-tuning"),
)  # fmt: skip
"""Kind of stage -> what a card calls it."""


def tags(run: RunFacts, stage: StageFacts) -> list[str]:
    """What the model can be found by."""
    architecture = shape(run, stage).get("architecture")
    found = ["moe", "mixture-of-experts", "greenmoe", *([str(architecture)] if architecture else [])]
    found += ["lora"] if stage.produces == "adapter" else []
    return found + (["compressed-tensors", f"{stage.metrics.get('bits', 4)}-bit"] if stage.kind == "quantize" else [])


def settings(run: RunFacts, stage: StageFacts) -> dict[str, Any]:
    """`train` of a stage as it was asked for; empty for one that does not train."""
    asked = next(one for one in run.config["stages"] if one["name"] == stage.name)
    return dict(asked.get("train") or {})


def shape(run: RunFacts, stage: StageFacts) -> dict[str, Any]:
    """Architecture, sizes and router of the model, from the pretraining it descends from; empty without one."""
    for one in run.lineage(stage):
        train = settings(run, one)
        if one.kind == "pretrain":
            parameters = {key: one.metrics.get(key) for key in ("total_params", "active_params")}
            return {**train["model"], **train["router"], **parameters, "seq_len": train["batches"]["seq_len"]}
    return {}


def evaluation(run: RunFacts, stage: StageFacts) -> Mapping[str, dict[str, Any]]:
    """Token set -> figures, where an `evaluate` stage measured this model."""
    rows: dict[str, dict[str, Any]] = {}
    for table in run.evaluations():
        rows.update(table.get(stage.name, {}))
    return rows


def missing(run: RunFacts, stage: StageFacts) -> list[str]:
    """What the joules of the model's lineage lack, in words."""
    return [
        words_
        for one in run.lineage(stage)
        for words_ in ([f"{one.name}: {w}" for w in one.ledger.missing] if one.ledger else [f"{one.name}: no record"])
    ]


def emissions(run: RunFacts, stage: StageFacts) -> dict[str, Any] | None:
    """`co2_eq_emissions` of a model and everything it was made from in this run; None when a part is not known."""
    only = _only(run, stage)
    kilograms = account.emissions_kg(only)
    if kilograms is None or missing(run, stage):
        return None
    facilities = {one.facility.model_dump_json(): one.facility for one in only.stages}.values()
    stated = "; ".join(
        f"{NAMES[name]} {figure.value:g}{' g/kWh' if name == 'carbon_g_per_kwh' else ''} ({figure.words})"
        for facility in facilities
        for name, figure in facility.stated().items()
        if name in ("carbon_g_per_kwh", "pue", "other_it_fraction")
    )
    whole = all("pue" in facility.stated() for facility in facilities)
    reach = "nodes, cooling and losses" if whole else "nodes alone"
    kinds = {one.kind for one in only.stages}
    trained = [word for kind, word in TRAINING_TYPES if kind in kinds]
    places = {facility.location for facility in facilities if facility.location}
    inherited = "; without what was inherited from other runs" if run.ledger and run.ledger.inherited else ""
    drawn = "estimated" if only.is_estimated else "measured"
    return {
        "emissions": float(f"{1e3 * kilograms:.4g}"),
        "source": f"GreenMoE energy ledger: {drawn} joules of all attempts ({reach}), times {stated}{inherited}",
        **({"training_type": " and ".join(trained)} if trained else {}),
        **({"geographical_location": "; ".join(sorted(places))} if places else {}),
        **({"hardware_used": run.machine} if run.machine else {}),
    }


def _only(run: RunFacts, stage: StageFacts) -> RunFacts:
    """The run as if it were this model's lineage alone, without what was superseded."""
    lineage = run.lineage(stage)
    names = {one.name for one in lineage}
    ledger = run.ledger
    if ledger is not None:
        ledger = replace(ledger, stages=tuple(one for one in ledger.stages if one.name in names))
    return replace(run, stages=tuple(lineage), ledger=ledger, goodput=None)


def _row_at(stage: StageFacts, step: int | None) -> dict[str, Any]:
    """The row of metrics of a checkpoint's step; empty when it is about the whole stage."""
    return next((row for row in stage.history if row["step"] == step), {}) if step is not None else {}


def cell(text: object) -> str:
    """Text from elsewhere in Markdown: on one line, no markup, no new column."""
    plain = " ".join(str(text).split())
    for sign, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'")):
        plain = plain.replace(sign, instead)
    return plain
