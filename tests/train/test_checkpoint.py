"""Checkpoints under injected faults, on a real process group of one rank."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hpc.errors import ArtifactError
from hpc.run.task import World
from hpc.train.checkpoint import MANIFEST, Checkpoints

ORIGIN = {"stage": "a1", "inputs": "b2"}


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpoints(root: Path, **changes: Any) -> Checkpoints:
    return Checkpoints(root, World(), {**ORIGIN, **changes}, keep=2)


def save(root: Path, step: int) -> None:
    def write(folder: Path) -> None:
        (folder / "engine").mkdir()
        (folder / "engine" / "states.pt").write_bytes(f"state of step {step}".encode() * 100)

    checkpoints(root).save(step, 1, write)


def newest_step(root: Path) -> int | None:
    found = checkpoints(root).newest()
    return found[1] if found else None


def test_the_newest_is_found_and_older_ones_are_pruned(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert newest_step(tmp_path) == 30
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000020", "step-00000030"]


def test_nothing_ever_saved_is_a_fresh_start(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "none") is None


@pytest.mark.parametrize("fault", ["flip", "cut", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_taken(tmp_path: Path, fault: str) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    states, manifest = tmp_path / "step-00000020/engine/states.pt", tmp_path / "step-00000020" / MANIFEST
    content = states.read_bytes()
    if fault == "flip":
        states.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    elif fault == "cut":
        states.write_bytes(content[:-1])
    elif fault == "remove":
        states.unlink()
    elif fault == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        manifest.unlink()
    assert newest_step(tmp_path) == 10
    assert len(list(tmp_path.glob("bad-step-00000020-*"))) == 1


def test_a_save_that_was_killed_leaves_the_published_ones_alone(tmp_path: Path) -> None:
    save(tmp_path, 10)
    half = tmp_path / ".staging-step-00000020-1"
    half.mkdir()
    (half / "states.pt").write_bytes(b"half")
    assert newest_step(tmp_path) == 10
    save(tmp_path, 20)
    assert not half.exists()


def test_when_all_are_damaged_training_does_not_silently_start_again(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "step-00000010/engine/states.pt").write_bytes(b"")
    with pytest.raises(ArtifactError, match="holds no readable checkpoint although some were published"):
        newest_step(tmp_path)


def test_a_checkpoint_of_something_else_is_refused_with_both_values(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with pytest.raises(ArtifactError, match="written with inputs = b2, this run has c3"):
        checkpoints(tmp_path, inputs="c3").newest()


def test_the_manifest_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    save(tmp_path, 10)
    content = json.loads((tmp_path / "step-00000010" / MANIFEST).read_text())
    assert content["step"] == 10
    assert content["origin"] == ORIGIN
    assert [entry["path"] for entry in content["files"]] == ["engine/states.pt"]
