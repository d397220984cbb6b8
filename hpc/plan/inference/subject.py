"""What a user means by MODEL: a folder, a stage of a run, a .gguf file, a Hub id, a chain, or a model known by name."""

import json
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hpc.errors import ConfigError, DataError
from hpc.plan.catalogue import SHAPES, plain_name
from hpc.plan.hub import FAMILIES
from hpc.plan.inference import gguf_file
from hpc.plan.inference.config_shape import of_config
from hpc.plan.inference.cost import Cost, measured_in_run
from hpc.plan.inference.formats import FORMATS, Size, size
from hpc.plan.shapes import Shape, of_ours


@dataclass(frozen=True)
class Stored:
    """A model that is in a format of its own already."""

    format: str
    size: Size
    how: str
    """Where the bytes come from."""


@dataclass(frozen=True)
class Subject:
    """The model that is asked about."""

    name: str
    shape: Shape
    context: int | None
    """The longest context that it was made for, where that is known."""
    source: str
    """Where the shape comes from."""
    stored: Stored | None = None
    costs: tuple[Cost, ...] = ()
    """What was measured beside it."""


def find(model: str, stage: str | None = None) -> Subject:
    """The model meant by a word. Raises ConfigError or DataError in one line."""
    path = Path(model).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return _of_chain(path, stage)
    if path.is_dir() and (path / "stages").is_dir():
        return _of_run(path, stage)
    if stage is not None:
        raise ConfigError(f"--stage {stage}: {model} is neither a run nor a chain's YAML file, leave --stage out")
    if path.suffix == ".gguf":
        return _of_gguf(path)
    if path.is_dir():
        return _of_folder(path)
    if path.exists() or path.is_absolute() or model.startswith((".", "~")):
        raise DataError(f"there is no model at {model}: name a folder with config.json or a .gguf file")
    return _cached(model) or _catalogued(model)


def _of_folder(path: Path) -> Subject:
    if (path / "artifact").is_dir():
        found = _of_folder(path / "artifact")
        costs = measured_in_run(path.parent.parent, path.name) if path.parent.name == "stages" else []
        return replace(found, name=path.name, costs=tuple(costs))
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _of_gguf(files[0])
        if (path / "adapter_config.json").exists():
            raise DataError(f"{path} holds adapters and no model: name the stage that merges them") from None
        raise DataError(f"{path}: config.json cannot be read ({error}): name a model's folder") from None
    shape, context = of_config(config, str(path / "config.json"))
    snapshot = re.search(r"models--(.+?)--(.+)", path.parent.parent.name) if path.parent.name == "snapshots" else None
    name = f"{snapshot[1]}/{snapshot[2]}" if snapshot else path.resolve().name
    return Subject(name, shape, context, f"{path}/config.json", _quantized(path, config, shape))


def _quantized(path: Path, config: dict[str, Any], shape: Shape) -> Stored | None:
    """A folder whose weights are quantized: its bytes on disk, spread evenly over what one token reads."""
    form = _format(config)
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if form is None or not weights:
        return None
    plain = size(shape, FORMATS["bf16"])
    return Stored(
        form, Size(weights, weights * plain.read / plain.weights, plain.parameters),
        f"measured: safetensors files of {path}",
    )  # fmt: skip


def _format(config: dict[str, Any]) -> str | None:
    """The format that a config.json states: one of ours where it is, else the library's own word; None without one."""
    stated = config.get("quantization_config") or {}
    if stated.get("quant_method") == "compressed-tensors":
        groups: list[dict[str, Any]] = list((stated.get("config_groups") or {}).values())
        weights = (groups[0].get("weights") if groups else None) or {}
        return f"{'fp' if weights.get('type') == 'float' else 'int'}{weights.get('num_bits')}"
    if stated.get("quant_method"):
        return str(stated["quant_method"])
    bits = (config.get("quantization") or {}).get("bits")
    return f"mlx-{bits}bit" if bits else None


def _of_run(path: Path, stage: str | None) -> Subject:
    kinds = ("config.json", "*.gguf")
    made = sorted({item.parent.parent.name for kind in kinds for item in path.glob(f"stages/*/artifact/{kind}")})
    if stage in made:
        return _of_folder(path / "stages" / stage)
    if not made:
        raise DataError(f"{path} has no finished stage with a model: name its configuration to plan with")
    said = f"--stage {stage}: no model was made by it" if stage else f"{path} is a run: say --stage"
    raise ConfigError(f"{said}; models of this run: {', '.join(made)}")


def _of_gguf(path: Path) -> Subject:
    if not path.is_file():
        raise DataError(f"there is no file {path}: check the path")
    found = gguf_file.read(path)
    stored = Stored(found.format or "gguf", found.size, f"measured: tensors of {path.name}")
    return Subject(found.name, found.shape, found.context, str(path), stored)


def _of_chain(path: Path, stage: str | None) -> Subject:
    """A chain's model before it is made: of the stage that is named, else of the last one that makes a model."""
    from hpc.config import Pretrain, Reuse
    from hpc.config.load import load_config
    from hpc.plan.facts import model_facts
    from hpc.plan.reused import source_config

    config = load_config(path)
    makers = [item.name for item in config.ordered() if item.produces in ("model", "adapter", "quantized")]
    if not makers or (stage is not None and stage not in makers):
        raise ConfigError(f"{path}: --stage {stage or ''} makes no model; those that do: {', '.join(makers) or 'none'}")
    found = config.stage(stage or makers[-1])
    while not isinstance(found, Pretrain | Reuse):
        found = config.needed(found, ["model", "adapter", "quantized"])[0]
    if isinstance(found, Pretrain):
        facts = model_facts(config, found.name)
        if facts is None:
            raise DataError(f"{path}: the tokenizer of {found.name} cannot be read here: run its prepare stage first")
        shape = of_ours(facts.model, facts.router, facts.vocab_size)
        return Subject(stage or makers[-1], shape, facts.seq_len, f"{path}, stage {found.name}")
    told = source_config(found.init, config.run_root)[0] if found.init and not found.upcycle else _reused(config, found)
    if told is None:
        raise DataError(f"{path}: the model that {found.name} starts from is not on this machine: fetch it first")
    shape, context = of_config(told, f"{path}, stage {found.name}")
    return Subject(stage or makers[-1], shape, context, f"{path}, stage {found.name}")


def _reused(config: Any, stage: Any) -> dict[str, Any] | None:
    """config.json of a reuse stage that upcycles, or goes on from another one."""
    from hpc.plan.reused import reused_config

    earlier = _reused(config, config.stage(stage.needs[0])) if stage.needs else None
    return reused_config(config, stage, earlier)


def _cached(model: str) -> Subject | None:
    """A Hub id whose files are in the cache of this machine."""
    if "/" not in model:
        return None  # before the import: it takes longer than all the arithmetic
    from hpc.config.reuse import Init
    from hpc.reuse.fetch import HUB_ID, SOURCES, locate

    if not HUB_ID.match(model):
        return None
    path = locate(Init.model_validate({"from": model}), Path("runs").absolute() / SOURCES)
    return _of_folder(path) if path is not None else None


def _catalogued(model: str) -> Subject:
    plain = plain_name(re.sub(r"-\d{4}$", "", model.rstrip("/").split("/")[-1]))
    shape = SHAPES.get(plain)
    if shape is None:
        close = get_close_matches(plain, SHAPES, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]!r}?" if close else "known are mixtral-8x7b, llama-3-8b and such."
        raise ConfigError(
            f"model {model!r} is neither a path, nor in this machine's Hub cache, nor a name that is known: {hint} "
            "Else name a folder with config.json"
        )
    context = next((length for prefix, (_, length) in FAMILIES.items() if plain.startswith(prefix)), None)
    spare = shape.extra_heads
    kept = replace(
        shape, extra_heads=0, attention_layers=shape.attention_layers - spare, moe_layers=shape.moe_layers - spare
    )
    return Subject(model, kept, context, "the catalogue of shapes (hpc/plan/catalogue.py)")
