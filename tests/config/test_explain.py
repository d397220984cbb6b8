"""Help for keys and the schema for editors."""

import json
from pathlib import Path

import pytest

from hpc.config.explain import explain, schema
from hpc.errors import ConfigError


def test_a_key_is_explained_with_type_default_and_docstring() -> None:
    text = explain("train.router.top_k")
    assert "whole number, > 0" in text
    assert "default: 2" in text
    assert "Experts per token." in text


def test_a_key_that_several_kinds_share_is_explained_once_with_all_paths() -> None:
    text = explain("batches.tokens_per_step")
    kinds = ("pretrain", "finetune", "relora", "lora")
    assert "\n".join(f"stages.{kind}.train.batches.tokens_per_step" for kind in kinds) in text
    assert text.count("Tokens of one optimizer step") == 1


def test_an_unknown_key_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'train\.router\.top_k'"):
        explain("train.router.topk")


def test_the_shipped_schema_is_the_one_of_the_code(root: Path) -> None:
    shipped = json.loads((root / "configs/schema.json").read_text())
    assert shipped == schema(), "run: python launch.py schema > configs/schema.json"


def test_every_key_has_a_docstring() -> None:
    undocumented = [
        f"{name}.{key}"
        for name, definition in schema()["$defs"].items()
        for key, field in definition.get("properties", {}).items()
        if not field.get("description")
    ]
    assert undocumented == []
