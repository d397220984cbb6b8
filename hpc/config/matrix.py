"""One stage of a file into many: `matrix` says which values its placeholders take.

    - name: lora                          becomes lora-modern and lora-python, which share the array "lora"
      matrix: { task: [modern, python] }
      needs: [pretrain, "text-{task}"]

A need that names a matrix stage means all its members.
"""

import copy
import itertools
from typing import Any

from hpc.errors import ConfigError

Places = dict[tuple[str | int, ...], Any]


def expand(data: dict[str, Any], places: Places) -> tuple[dict[str, Any], Places]:
    """The data and places of a file with every matrix written out. Raises ConfigError."""
    stages = data.get("stages")
    if not isinstance(stages, list) or not any(isinstance(stage, dict) and "matrix" in stage for stage in stages):
        return data, places
    expanded: list[Any] = []
    moved: Places = {path: place for path, place in places.items() if path[:1] != ("stages",) or len(path) == 1}
    members: dict[str, list[str]] = {}
    for index, stage in enumerate(stages):
        for copied in _members(stage, places.get(("stages", index, "matrix"), places[()])):
            for path, place in places.items():
                if path[:2] == ("stages", index):
                    moved[("stages", len(expanded), *path[2:])] = place
            if copied is not stage:
                members.setdefault(str(copied.get("array")), []).append(str(copied.get("name")))
            expanded.append(copied)
    for stage in expanded:
        if isinstance(stage, dict) and isinstance(stage.get("needs"), list):
            stage["needs"] = [name for need in stage["needs"] for name in members.get(str(need), [need])]
    return {**data, "stages": expanded}, moved


def _members(stage: Any, place: Any) -> list[Any]:
    if not isinstance(stage, dict) or "matrix" not in stage:
        return [stage]
    matrix = stage["matrix"]
    if not isinstance(matrix, dict) or not matrix or not all(isinstance(v, list) and v for v in matrix.values()):
        raise ConfigError(f"{place}: matrix: expected names with lists of values, such as {{task: [modern, python]}}")
    for name, values in matrix.items():
        if not all(isinstance(value, (str, int, float)) for value in values):
            raise ConfigError(f"{place}: matrix.{name}: its values must be words or numbers")
    rest = {key: value for key, value in stage.items() if key != "matrix"}
    array = str(stage.get("name", "stage"))
    members = []
    for combination in itertools.product(*matrix.values()):
        chosen = dict(zip(matrix, combination, strict=True))
        member = _filled(copy.deepcopy(rest), chosen)
        if not any(f"{{{key}}}" in array for key in matrix):
            member["name"] = "-".join([array, *map(str, combination)])
        member["array"] = array.split("{")[0].rstrip("-._") or array
        members.append(member)
    return members


def _filled(value: Any, chosen: dict[str, Any]) -> Any:
    """A value with its placeholders filled in; a text that is nothing but a placeholder takes the value's type."""
    if isinstance(value, dict):
        return {str(_filled(key, chosen)): _filled(inner, chosen) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, chosen) for inner in value]
    if isinstance(value, str):
        for key, replacement in chosen.items():
            if value == f"{{{key}}}":
                return replacement
            value = value.replace(f"{{{key}}}", str(replacement))
    return value
