"""Checkpoints on a real process group of one rank: what is kept, what is refused, what a full disk does."""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hpc.errors import ArtifactError, Fenced, StorageError
from hpc.run.task import World
from hpc.train import checkpoint as module
from hpc.train.checkpoint import MANIFEST, Checkpoints, published, read_manifest
from hpc.train.fragments import Fragment, copy_fragments, read_fragments, write_fragments
from hpc.train.saving import Copy, Write

ORIGIN = {"stage": "a1", "inputs": "b2", "data": "c3"}
SIZE = 5000  # values: more than a page, so that a page can be zeroed


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpoints(root: Path, *, keep: int = 2, origin: dict[str, str] = ORIGIN, **options: Any) -> Checkpoints:
    return Checkpoints(root, World(), origin, keep=keep, **options)


def state(step: int) -> list[Fragment]:
    values = torch.arange(SIZE, dtype=torch.float32) + 10_000 * step
    return [Fragment("a.weight", (SIZE,), 0, {"weight": values, "exp_avg": -values})]


def snapshot(step: int, fragments: list[Fragment] | None = None) -> Copy:
    def copy() -> Write:
        held = copy_fragments(fragments or state(step), {})
        return lambda folder: write_fragments(folder, 0, held, step)

    return copy


def save(root: Path, *steps: int, **options: Any) -> None:
    saved = checkpoints(root, **options)
    for step in steps:
        saved.save(step, 1, snapshot(step))
    saved.wait()


def loaded_step(root: Path, **options: Any) -> int | None:
    """Step of the checkpoint that is taken, after its values were compared with that step's."""
    found = checkpoints(root, **options).newest()
    if found is None:
        return None
    folder, step = found
    target = [Fragment("a.weight", (SIZE,), 0, {"weight": torch.zeros(SIZE), "exp_avg": torch.zeros(SIZE)})]
    assert read_fragments(folder, target) == step
    for value, tensor in state(step)[0].values.items():
        assert torch.equal(target[0].values[value], tensor)
    return step


def steps(root: Path) -> list[int]:
    return [module.step_of(path) for path in published(root)]


def test_the_newest_is_found_and_older_ones_are_pruned(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    assert loaded_step(tmp_path) == 30
    assert steps(tmp_path) == [20, 30]


def test_milestones_stay_for_good_also_after_the_stage(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, 40, 50, 60, 70, keep=2, keep_every=30)
    assert steps(tmp_path) == [30, 60, 70]
    checkpoints(tmp_path, keep_every=30).clear()
    assert steps(tmp_path) == [30, 60]
    checkpoints(tmp_path).clear()
    assert not tmp_path.exists()


def test_nothing_ever_saved_is_a_fresh_start(tmp_path: Path) -> None:
    assert loaded_step(tmp_path / "none") is None


def test_what_changes_after_the_copy_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    fragments = state(10)
    may_write = threading.Event()

    def copy() -> Write:
        write = snapshot(10, fragments)()

        def write_later(folder: Path) -> Any:
            assert may_write.wait(10)
            return write(folder)

        return write_later

    saved = checkpoints(tmp_path)
    saved.save(10, 1, copy)
    saved.copied()
    for tensor in fragments[0].values.values():
        tensor.fill_(0.123)  # the next update
    assert steps(tmp_path) == [], "it cannot be there yet"
    may_write.set()
    saved.wait()
    assert loaded_step(tmp_path) == 10


def test_the_update_waits_for_the_copy_and_for_nothing_else(tmp_path: Path) -> None:
    may_copy, may_write = threading.Event(), threading.Event()

    def copy() -> Write:
        assert may_copy.wait(10)
        write = snapshot(10)()
        return lambda folder: write(folder) if may_write.wait(10) else []

    saved = checkpoints(tmp_path)
    saved.save(10, 1, copy)
    threading.Timer(0.3, may_copy.set).start()
    began = time.monotonic()
    saved.copied()
    assert time.monotonic() - began > 0.25
    saved.copied()  # the write is held up, and nobody waits for it
    may_write.set()
    saved.wait()


def test_a_save_that_still_runs_is_waited_for_by_the_next_one(tmp_path: Path) -> None:
    order: list[str] = []

    def slow() -> Write:
        write = snapshot(10)()

        def late(folder: Path) -> Any:
            time.sleep(0.3)
            order.append("first is written")
            return write(folder)

        return late

    def second() -> Write:
        order.append("second is copied")
        return snapshot(20)()

    saved = checkpoints(tmp_path)
    saved.save(10, 1, slow)
    saved.save(20, 1, second)
    saved.wait()
    assert order == ["first is written", "second is copied"]
    assert steps(tmp_path) == [10, 20]


def test_without_background_a_save_is_published_when_it_returns(tmp_path: Path) -> None:
    checkpoints(tmp_path, in_background=False).save(10, 1, snapshot(10))
    assert loaded_step(tmp_path) == 10


def test_its_files_are_plain_safetensors_with_the_hash_of_what_was_in_memory(tmp_path: Path) -> None:
    save(tmp_path, 10)
    path = tmp_path / "step-00000010/fragments-00000.safetensors"
    assert torch.equal(load_file(path)["exp_avg|a.weight|0"], state(10)[0].values["exp_avg"])
    entries = {entry["path"]: entry for entry in read_manifest(path.parent)["files"]}
    assert entries[path.name]["bytes"] == path.stat().st_size
    assert entries[path.name]["xxh3_128"] == module.hash_file(path)
    assert set(entries) == {path.name, "state.json"}
    assert {file.name for file in path.parent.iterdir()} == {*entries, MANIFEST}


def change(path: Path, start: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    assert content[start : start + len(new)] != new, "this fault changes nothing"
    content[start : start + len(new)] = new
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    """The right bytes, but elsewhere, where nobody keeps them as they are."""
    path.rename(path.parents[2] / path.name)
    path.symlink_to(path.parents[2] / path.name)


NAME = "fragments-00000.safetensors"
FAULTS: dict[str, Callable[[Path], object]] = {
    "bit": lambda at: change(at / NAME, 12_345, bytes([(at / NAME).read_bytes()[12_345] ^ 1])),
    "page": lambda at: change(at / NAME, 8192, bytes(4096)),
    "truncated": lambda at: os.truncate(at / NAME, (at / NAME).stat().st_size - 1),
    "longer": lambda at: (at / NAME).open("ab").write(b"x"),
    "missing": lambda at: (at / NAME).unlink(),
    "stale shard": lambda at: shutil.copy(at.with_name("step-00000010") / NAME, at),
    "shard too many": lambda at: shutil.copy(at.with_name("step-00000010") / NAME, at / NAME.replace("00000", "00001")),
    "stale checkpoint": lambda at: (shutil.rmtree(at), shutil.copytree(at.with_name("step-00000010"), at)),
    "symlink to a file": lambda at: replace_by_link(at / NAME),
    "symlink to a checkpoint": lambda at: (shutil.rmtree(at), at.symlink_to(at.with_name("step-00000010"))),
    "state of another step": lambda at: shutil.copy(at.with_name("step-00000010") / "state.json", at),
    "manifest truncated": lambda at: os.truncate(at / MANIFEST, (at / MANIFEST).stat().st_size - 20),
    "manifest empty": lambda at: (at / MANIFEST).write_bytes(b""),
    "manifest missing": lambda at: (at / MANIFEST).unlink(),
    "manifest not of us": lambda at: (at / MANIFEST).write_text("[]"),
    "manifest bit": lambda at: change(at / MANIFEST, (at / MANIFEST).read_bytes().index(b'"b2"') + 1, b"c"),
    "stale manifest": lambda at: shutil.copy(at.with_name("step-00000010") / MANIFEST, at),
    "empty folder": lambda at: (shutil.rmtree(at), at.mkdir()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_taken(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "checkpoints"
    save(root, 10, 20)
    FAULTS[fault](root / "step-00000020")
    assert loaded_step(root) == 10
    assert len(list(root.glob("bad-step-00000020-*"))) == 1
    assert "step-00000020 is damaged" in capsys.readouterr().out
    assert loaded_step(root) == 10, "and the one that is left is as it was"


@pytest.mark.parametrize("stray", ["empty file", "wrong step", "link to the oldest", "dangling link"])
def test_a_file_called_latest_changes_nothing(tmp_path: Path, stray: str) -> None:
    save(tmp_path, 10, 20)
    latest = tmp_path / "latest"
    if stray == "empty file":
        latest.touch()
    elif stray == "wrong step":
        latest.write_text("step-00000010")
    else:
        latest.symlink_to("step-00000010" if stray == "link to the oldest" else "gone")
    assert loaded_step(tmp_path) == 20
    assert not list(tmp_path.glob("bad-*"))
    save(tmp_path, 30)
    assert loaded_step(tmp_path) == 30


def test_folders_that_only_look_like_checkpoints_are_not_looked_at(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for name in ("step-00000010-copy", "step-final", "step-7", ".step-00000099"):
        (tmp_path / name).mkdir()
    assert loaded_step(tmp_path) == 10


@pytest.mark.parametrize("was_noted", [True, False])
def test_when_all_are_damaged_training_does_not_silently_start_again(tmp_path: Path, was_noted: bool) -> None:
    save(tmp_path, 10)
    FAULTS["missing"](tmp_path / "step-00000010")
    if not was_noted:  # killed between publishing and noting it
        (tmp_path / "committed.jsonl").unlink()
    with pytest.raises(ArtifactError, match="holds no readable checkpoint although some were published"):
        loaded_step(tmp_path)


@pytest.mark.parametrize("key", ORIGIN)
def test_a_checkpoint_of_something_else_is_refused_with_both_values(tmp_path: Path, key: str) -> None:
    save(tmp_path, 10)
    with pytest.raises(ArtifactError, match=f"written with {key} = {ORIGIN[key]}, this run has another"):
        checkpoints(tmp_path, origin={**ORIGIN, key: "another"}).newest()


def test_the_manifest_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    save(tmp_path, 10, facts={"layout": {"ranks": 1}})
    content = json.loads((tmp_path / "step-00000010" / MANIFEST).read_text())
    assert (content["step"], content["attempt"], content["origin"]) == (10, 1, ORIGIN)
    assert content["layout"] == {"ranks": 1}


def test_an_attempt_that_was_superseded_while_it_wrote_publishes_nothing(tmp_path: Path) -> None:
    def superseded() -> None:
        raise Fenced("attempt 1 was superseded")

    with pytest.raises(Fenced):
        save(tmp_path, 10, check_fence=superseded)
    assert steps(tmp_path) == []


def test_the_same_step_again_replaces_the_one_before_only_when_it_is_complete(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    before = (tmp_path / "step-00000020").stat().st_ino
    save(tmp_path, 20)
    assert loaded_step(tmp_path) == 20
    assert (tmp_path / "step-00000020").stat().st_ino != before
    assert not list(tmp_path.glob(".*"))


def test_an_error_while_writing_is_seen_before_the_next_update_and_told_once_it_is_asked_for(tmp_path: Path) -> None:
    def broken() -> Write:
        def write(folder: Path) -> Any:
            raise OSError(5, "Input/output error", str(folder / "a"))

        return write

    save(tmp_path, 10)
    saved = checkpoints(tmp_path)
    saved.save(20, 1, broken)
    while not saved.has_failed:
        time.sleep(0.01)
    with pytest.raises(StorageError, match=r"cannot write .*/a: Input/output error"):
        saved.save(30, 1, snapshot(30))
    assert not saved.has_failed
    assert loaded_step(tmp_path) == 10


def test_too_little_room_is_said_with_both_numbers_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoints(tmp_path)
    monkeypatch.setattr(module, "free_bytes", lambda _: 60_000_000)
    saved.expect(50_000_000)
    with pytest.raises(StorageError, match=r"takes 71 MB and .* has 60 MB free: .*keep_checkpoints = 2"):
        saved.expect(70_000_000)
    saved.save(10, 1, snapshot(10))
    with pytest.raises(StorageError, match="takes 71 MB"):
        saved.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 128 KiB: room for two checkpoints of 40 KB and not for a third."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_costs_nothing_that_was_published(tiny_disk: Path) -> None:
    save(tiny_disk, 10, 20)
    saved = checkpoints(tiny_disk)
    saved.save(30, 1, snapshot(30))
    with pytest.raises(StorageError, match="No space left on device; free some space or --set run_root="):
        saved.wait()
    assert steps(tiny_disk) == [10, 20]
    assert not list(tiny_disk.glob(".*")), "what was half written must be gone, to make room for a last word"
    assert loaded_step(tiny_disk) == 20
    with pytest.raises(StorageError, match=r"takes 1 MB and .* has 0 MB free"):
        saved.expect(40_000)
    subprocess.run(["mount", "-o", "remount,size=2m", str(tiny_disk)], check=True)
    saved.expect(40_000)
    save(tiny_disk, 30)
    assert loaded_step(tiny_disk) == 30
