"""A run: one YAML file, a chain of named stages. The chain is checked here, when it is loaded."""

import re
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from hpc.config.base import Frozen
from hpc.config.gate import Gate
from hpc.config.near import nearest
from hpc.config.stages import Artifact, Export, Finetune, Lora, Pretrain, Quantize, Relora, Stage


class Tracking(Frozen):
    """Weights & Biases, the mirror of metrics.jsonl. One run per stage, grouped by the chain, whatever happens to its
    attempts. A process beside the trainer sends it; what it cannot send, `launch.py sync RUN` does later."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online where WANDB_API_KEY is set and offline where it is not; `launch.py` never asks for a key."""

    project: str = "greenmoe"
    """W&B project."""

    entity: str | None = None
    """W&B team or user."""


class RunConfig(Frozen):
    """One chain, from raw text to a model that answers."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run; its directory is run_root/name."""

    run_root: str = "runs"
    """Folder that holds run directories, relative to where `launch.py` is called."""

    seed: NonNegativeInt = 1
    """Seed of initial weights, data order and generated text."""

    tracking: Tracking = Tracking()
    """Where metrics are mirrored to."""

    retries: NonNegativeInt = 3
    """On Slurm: how often a crashed stage starts again by itself, as long as it makes progress in between. Preemption,
    time limits and lost nodes do not count; running out of memory, bad settings and missed gates are never retried."""

    energy_budget_kwh: PositiveFloat | None = None
    """IT energy that all stages together may draw, kWh, failed attempts and superseded stages included. The plan
    refuses to start above it; when it is spent, training saves a checkpoint and stops. Raise it to go on."""

    stages: list[Stage] = Field(min_length=1)
    """The chain. Stages run as soon as what they need is there; order in the file does not matter."""

    @model_validator(mode="before")
    @classmethod
    def _reuse_what_stages_start_from(cls, values: Any) -> Any:
        """A training stage with `init` needs a reuse stage, one for each checkpoint."""
        stages = values.get("stages") if isinstance(values, dict) else None
        if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
            return values
        return {**values, "stages": with_reuse(stages)}

    @model_validator(mode="before")
    @classmethod
    def _report_on_everything(cls, values: Any) -> Any:
        """A report that names no needs is about all other stages."""
        stages = values.get("stages") if isinstance(values, dict) else None
        if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
            return values
        others = [stage.get("name") for stage in stages if stage.get("kind") != "report"]
        filled = [
            {**stage, "needs": others} if stage.get("kind") == "report" and not stage.get("needs") else stage
            for stage in stages
        ]
        return {**values, "stages": filled}

    @model_validator(mode="after")
    def _check_chain(self) -> Self:
        names = [stage.name for stage in self.stages]
        for index, stage in enumerate(self.stages):
            where = f"stages[{index}] {stage.name!r}"
            if names.index(stage.name) != index:
                raise ValueError(f"{where}: the name is used twice: stage names must be unique")
            for need in stage.needs:
                if need not in names:
                    raise ValueError(f"{where} needs {need!r}, which is not a stage{nearest(need, names)}")
            if len(set(stage.needs)) != len(stage.needs):
                raise ValueError(f"{where}: needs names a stage twice: drop one")
        try:
            tuple(TopologicalSorter({stage.name: stage.needs for stage in self.stages}).static_order())
        except CycleError as error:
            circle = " -> ".join(reversed(error.args[1]))
            raise ValueError(f"the chain goes in a circle ({circle}): drop one of these needs") from None
        for index, stage in enumerate(self.stages):
            for gate in map(Gate.parse, stage.gate):
                if gate.stage is not None and gate.stage not in stage.needs:
                    raise ValueError(
                        f"stages[{index}] {stage.name!r}: gate {gate.text!r} asks for {gate.stage!r}, which "
                        f"it does not need{nearest(gate.stage, stage.needs)}"
                    )
            _check_inputs(f"stages[{index}] {stage.name!r}", stage, {s.name: s.produces for s in self.stages})
            if isinstance(stage, (Pretrain, Finetune, Relora, Lora)):
                texts = [need.name for need in self.needed(stage, ["tokens"])]
                _check_mixture(f"stages[{index}] {stage.name!r}", stage.train.mixture, texts)
            if isinstance(stage, (Quantize, Export)) and stage.looks_at_text and not self.needed(stage, ["tokens"]):
                which = "importance_tokens looks"
                if isinstance(stage, Quantize):
                    which = "method = auto_round, bits_per_weight and min_expert_tokens look"
                raise ValueError(
                    f"stages[{index}] {stage.name!r}: {which} at text, and needs names no stage that produces tokens: "
                    "add one, or drop these settings"
                )
        return self

    def ordered(self) -> list[Stage]:
        """Stages in an order in which each comes after what it needs."""
        graph = {stage.name: stage.needs for stage in self.stages}
        return [self.stage(name) for name in TopologicalSorter(graph).static_order()]

    def stage(self, name: str) -> Stage:
        """The stage of that name; KeyError when there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def needed(self, stage: Stage, produces: Iterable[Artifact]) -> list[Stage]:
        """The stages that `stage` needs and that produce one of the named artifacts, in the order of `needs`."""
        wanted = tuple(produces)
        return [self.stage(need) for need in stage.needs if self.stage(need).produces in wanted]


def with_reuse(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stages with a `reuse` stage before the first that starts from a checkpoint by `init`, named init-CHECKPOINT."""
    names = {str(stage.get("name")) for stage in stages}
    made: dict[str, str] = {}
    found: list[dict[str, Any]] = []
    for stage in stages:
        init, begins = stage.get("init"), stage.get("kind") not in ("reuse", "pretrain")
        if not begins or not isinstance(init, dict) or not isinstance(init.get("from"), str):
            found.append(stage)
            continue
        key = repr(sorted(init.items()))
        if key not in made:
            word = re.sub(r"[^a-z0-9._-]+", "-", init["from"].rstrip("/").split("/")[-1].lower().removesuffix(".gguf"))
            name = f"init-{word.strip('-._') or 'model'}"[:60]
            number = sum(other == name or other.startswith(f"{name}-") for other in made.values())
            made[key] = f"{name}-{number + 1}" if number else name
            if made[key] not in names:
                found.append({"name": made[key], "kind": "reuse", "init": init})
        needs = stage.get("needs") or []
        found.append(stage if made[key] in needs else {**stage, "needs": [made[key], *needs]})
    return found


def _check_inputs(where: str, stage: Stage, produces: dict[str, Artifact]) -> None:
    left = [(need, produces[need]) for need in stage.needs]
    for alternatives in stage.requires:
        found = next((item for item in left if item[1] in alternatives), None)
        if found is None:
            makers = [name for name, artifact in produces.items() if artifact in alternatives and name != stage.name]
            hint = f"add one of {', '.join(makers)} to needs" if makers else "add a stage that makes one"
            raise ValueError(f"{where} ({stage.kind}) needs a stage that produces {' or '.join(alternatives)}: {hint}")
        left.remove(found)
    for need, artifact in left:
        if artifact not in stage.accepts:
            raise ValueError(
                f"{where} ({stage.kind}) cannot use {need!r}, which produces {artifact}: drop it from needs"
            )
    if stage.kind == "prepare" and len(stage.needs) > 1:
        raise ValueError(f"{where} needs {len(stage.needs)} stages, but takes its tokenizer from one: keep one")


def _check_mixture(where: str, mixture: dict[str, float], texts: list[str]) -> None:
    """A mixture names every needed stage that produces tokens, and no other."""
    for name in mixture:
        if name not in texts:
            raise ValueError(
                f"{where}: train.mixture names {name!r}, which is none of its needs that produce tokens"
                f"{nearest(name, texts)}"
            )
    missing = [name for name in texts if name not in mixture]
    if missing and (mixture or len(texts) > 1):
        raise ValueError(
            f"{where}: train.mixture gives no weight to {missing[0]!r}, which the stage needs: add it, or drop it "
            "from needs"
        )
