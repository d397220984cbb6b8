"""Every expert of every layer, in the file as in memory; what a wrong conversion would leave is found and named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hpc.config import Model, Router
from hpc.errors import ArtifactError
from hpc.model.build import build_model, load_model, model_config, save_model
from hpc.model.census import verify_model

ARCHITECTURES = ("qwen3_moe", "olmoe", "mixtral")


def write(folder: Path, architecture: Any, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A small model's weights, and the census of the folder they were written to."""
    shape = Model(architecture=architecture, hidden_size=32, num_layers=3, num_attention_heads=4, expert_size=16)
    config = model_config(shape, Router(num_experts=4), 64, 32, 0)
    state = {name: value.clone() for name, value in build_model(config, seed).state_dict().items()}
    return state, save_model(config, state, folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_was_written_right_has_one_digest_per_layer(tmp_path: Path, architecture: str) -> None:
    state, groups = write(tmp_path / "a", architecture)
    digests = groups["experts"]["xxh3_64_by_layer"]
    assert sorted(digests) == ["0", "1", "2"]
    assert len(set(digests.values())) == 3
    assert verify_model(tmp_path / "a", state) == digests
    _, others = write(tmp_path / "b", architecture, seed=1)
    assert not set(digests.values()) & set(others["experts"]["xxh3_64_by_layer"].values())


def experts(stored: dict[str, Tensor], layer: int, expert: int) -> dict[str, str]:
    """Names of an expert's matrices in a file: gate, up, down."""
    names = [name for name in stored if f"layers.{layer}." in name and f".experts.{expert}." in name]
    by_last = {name.removesuffix(".weight").rsplit(".", 1)[1]: name for name in names}
    if "w1" in by_last:
        return {"gate": by_last["w1"], "up": by_last["w3"], "down": by_last["w2"]}
    return {role: by_last[f"{role}_proj"] for role in ("gate", "up", "down")}


def swap(stored: dict[str, Tensor], one: str, other: str) -> None:
    stored[one], stored[other] = stored[other].clone(), stored[one].clone()


def swap_gate_and_up(stored: dict[str, Tensor]) -> None:
    names = experts(stored, 1, 2)
    swap(stored, names["gate"], names["up"])


def swap_two_experts(stored: dict[str, Tensor]) -> None:
    swap(stored, experts(stored, 1, 2)["down"], experts(stored, 1, 3)["down"])


def write_one_twice(stored: dict[str, Tensor]) -> None:
    for role, name in experts(stored, 1, 2).items():
        stored[name] = stored[experts(stored, 1, 1)[role]].clone()


def drop_one(stored: dict[str, Tensor]) -> None:
    for name in experts(stored, 1, 2).values():
        del stored[name]


def round_one(stored: dict[str, Tensor]) -> None:
    name = experts(stored, 1, 2)["up"]
    stored[name] = stored[name].bfloat16().float()


def transpose_router(stored: dict[str, Tensor]) -> None:
    name = next(name for name in stored if name.endswith("layers.1.mlp.gate.weight"))
    stored[name] = stored[name].flip(0).contiguous()


FAULTS: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (swap_gate_and_up, "layer 1, expert 2: gate differs and 1 more"),
    (swap_two_experts, "layer 1, expert 2: down differs and 1 more"),
    (write_one_twice, "layer 1, expert 2: down differs and 2 more"),
    (drop_one, "layer 1, expert 2: down differs and 2 more"),
    (round_one, "layer 1, expert 2: up differs;"),
]


@pytest.mark.parametrize(("fault", "told"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_wrong_expert_in_the_file_is_named(
    tmp_path: Path, architecture: str, fault: Callable[[dict[str, Tensor]], None], told: str
) -> None:
    state, _ = write(tmp_path, architecture)
    stored = load_file(tmp_path / "model.safetensors")
    fault(stored)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=told):
        verify_model(tmp_path, state)
    if fault in (swap_gate_and_up, swap_two_experts):  # nothing else would notice
        assert torch.isfinite(load_model(tmp_path)(torch.arange(8)[None]).logits).all()


def test_a_router_whose_rows_are_in_another_order_is_named(tmp_path: Path) -> None:
    state, _ = write(tmp_path, "qwen3_moe")
    stored = load_file(tmp_path / "model.safetensors")
    transpose_router(stored)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model.layers.1.mlp.gate.weight differs;"):
        verify_model(tmp_path, state)
