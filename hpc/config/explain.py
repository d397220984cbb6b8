"""Help for configuration keys and the JSON schema for editors, both made from the classes themselves."""

import typing
from collections.abc import Iterator
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hpc.config.load import model_classes
from hpc.config.near import nearest
from hpc.config.run import RunConfig
from hpc.errors import ConfigError

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def explain(dotted: str) -> str:
    """What a key means: type, default, bounds, docstring. Raises ConfigError for a key that does not exist.

    A path may start anywhere: `stages.train.router.top_k`, `pretrain.train.router.top_k`, `train.router.top_k`.
    """
    wanted = tuple(dotted.split("."))
    known = list(_walk(RunConfig, ()))
    found = [(path, field) for path, field in known if path[-len(wanted) :] == wanted]
    if not found:
        tails = {".".join(path[start:]) for path, _ in known for start in range(len(path))}
        raise ConfigError(f"explain: there is no key {dotted!r}{nearest_tail(dotted, tails)}")
    texts: dict[str, list[str]] = {}
    for path, field in found:
        texts.setdefault(_describe(field), []).append(".".join(path))
    return "\n\n".join("\n".join([*paths, text]) for text, paths in texts.items())


def nearest_tail(dotted: str, tails: set[str]) -> str:
    """'did you mean', without the list of everything when nothing is near."""
    hint = nearest(dotted, sorted(tails))
    return hint if hint.startswith("; did") else "; `python launch.py schema` lists them all"


def schema() -> dict[str, Any]:
    """JSON schema of a configuration file. A file may extend another one, so no key is required at the top."""
    content = RunConfig.model_json_schema()
    content.pop("required", None)
    extends = {
        "description": "File, or list of files, that this one is laid over; lists of named things merge by name.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    content["properties"] = {"extends": extends, **content["properties"]}
    matrix = {
        "description": "Writes the stage out once for each combination of values; {name} stands for the value.",
        "type": "object",
        "additionalProperties": {"type": "array", "minItems": 1},
    }
    for definition in content["$defs"].values():
        if "kind" in definition.get("properties", {}) and "needs" in definition["properties"]:
            definition["properties"]["matrix"] = matrix
            gate = definition["properties"]["gate"]
            definition["properties"]["gate"] = {"anyOf": [{"type": "string"}, gate], "description": gate["description"]}
    return {"$schema": SCHEMA_DIALECT, **content}


def _walk(model: type[BaseModel], above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every key below a class; stages appear by their kind."""
    for name, field in model.model_fields.items():
        path = (*above, name)
        yield path, field
        for inner in model_classes(field.annotation):
            kind = inner.model_fields.get("kind")
            yield from _walk(inner, (*path, typing.get_args(kind.annotation)[0]) if kind else path)


def _describe(field: FieldInfo) -> str:
    lines = [f"  type:    {type_words(field.annotation)}{_bounds(field)}"]
    if field.is_required():
        lines.append("  default: none, the key is required")
    else:
        default = (
            field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
        )
        lines.append(f"  default: {_value(default)}")
    lines.append("")
    lines.extend(f"  {line.strip()}" for line in (field.description or "").splitlines())
    classes = list(model_classes(field.annotation))
    for inner in classes:
        lines.append("")
        lines.extend(f"  {line.strip()}".rstrip() for line in (inner.__doc__ or "").strip().splitlines())
        for name, key in inner.model_fields.items():
            lines.append(f"    {name:<28} {(key.description or '').split('. ')[0].splitlines()[0].rstrip('.')}")
    return "\n".join(lines)


def type_words(annotation: Any) -> str:
    """A type as a user would say it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is typing.Annotated:
        return type_words(arguments[0])
    if origin in (list, tuple):
        return f"list of {type_words(arguments[0])}"
    if origin is dict:
        return "mapping"
    if arguments:  # a union
        return " or ".join("nothing" if value is type(None) else type_words(value) for value in arguments)
    words = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(field: FieldInfo) -> str:
    words = []
    for bound in field.metadata:
        for kind, sign, name in ((Gt, ">", "gt"), (Ge, ">=", "ge"), (Lt, "<", "lt"), (Le, "<=", "le")):
            if isinstance(bound, kind):
                words.append(f"{sign} {getattr(bound, name)}")
    return f", {' and '.join(words)}" if words else ""


def _value(value: Any) -> str:
    if isinstance(value, BaseModel):
        return ", ".join(f"{name}: {_value(inner)}" for name, inner in value) or "{}"
    return "nothing" if value is None else str(value)
