"""Files that are whole or not there, receipts that notice any change, and attempts that are never forgotten."""

from pathlib import Path

import pytest

from hpc.errors import ArtifactError, BusyError, StorageError
from hpc.run.attempts import Job, attempt_ends, count_attempts, exclusive, record_end, record_start
from hpc.run.directory import RunDirectory, StageDirectory, append_jsonl, read_jsonl, write_json
from hpc.run.receipt import Receipt, list_files, read_receipt, verify, write_receipt
from slurm.state import describe_change


@pytest.fixture
def stage(tmp_path: Path) -> StageDirectory:
    directory = StageDirectory(tmp_path / "stages/text")
    (directory.artifact / "tokenizer").mkdir(parents=True)
    (directory.artifact / "train.bin").write_bytes(bytes(range(100)))
    (directory.artifact / "tokenizer/tokenizer.json").write_text("{}")
    return directory


def receipt(directory: StageDirectory) -> Receipt:
    return Receipt(
        stage="text", kind="prepare", config={}, inputs={}, files=list_files(directory.artifact), metrics={},
        provenance={}, energy={}, code={}, seconds=1.0, attempts=1,
    )  # fmt: skip


def test_a_receipt_comes_back_as_it_was_written(stage: StageDirectory) -> None:
    written = receipt(stage)
    write_receipt(stage, written)
    assert read_receipt(stage) == written
    assert written.size_bytes == 102
    verify(stage, written)


@pytest.mark.parametrize("fault", ["flip", "grow", "remove"])
def test_any_change_to_a_file_is_refused_by_its_name(stage: StageDirectory, fault: str) -> None:
    made = receipt(stage)
    path = stage.artifact / "train.bin"
    if fault == "flip":
        path.write_bytes(bytes([1]) + path.read_bytes()[1:])
    elif fault == "grow":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match=r"train\.bin"):
        verify(stage, made)


def test_the_digest_depends_on_names_and_contents_alone(stage: StageDirectory) -> None:
    before = receipt(stage).digest
    (stage.artifact / "train.bin").touch()
    assert receipt(stage).digest == before
    (stage.artifact / "train.bin").rename(stage.artifact / "other.bin")
    assert receipt(stage).digest != before


def test_a_receipt_that_cannot_be_read_says_what_to_do(stage: StageDirectory) -> None:
    stage.receipt.write_text("{")
    with pytest.raises(ArtifactError, match="to make it again"):
        read_receipt(stage)


def test_a_failed_write_leaves_the_old_file_and_no_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    with pytest.raises(StorageError, match="--set run_root=DIR"):
        write_json(tmp_path / "none" / "file.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    assert "old" in path.read_text()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2')
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}]


def test_what_follows_a_torn_line_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    append_jsonl(path, {"a": 3})
    append_jsonl(path, {"a": 4})
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}, {"a": 4}]


def test_attempts_are_counted_and_their_ends_kept(stage: StageDirectory) -> None:
    for attempt in (1, 2):
        started = record_start(stage, Job("token", "7", restart=attempt - 1), 2, "127.0.0.1", 29500)
        assert started.number == attempt
    record_end(stage, 1, 1, "failed", 6, "lost")
    record_end(stage, 2, 0, "done")
    assert count_attempts(stage) == 2
    assert [row["outcome"] for row in attempt_ends(stage, 1)] == ["failed"]


def test_a_lock_is_held_by_one_and_names_its_holder(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / ".lock", "the run"),
        pytest.raises(BusyError, match="the run is in use by process"),
        exclusive(tmp_path / ".lock", "the run"),
    ):
        pass
    with exclusive(tmp_path / ".lock", "the run"):
        pass


def test_a_superseded_stage_keeps_what_it_spent(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    for _ in range(2):
        run.stage("text").root.mkdir(parents=True)
        run.supersede("text")
    assert sorted(p.name for p in (run.root / "superseded").iterdir()) == ["text-1", "text-2"]


def test_a_run_directory_is_private(tmp_path: Path) -> None:
    assert RunDirectory.create(tmp_path, "demo").root.stat().st_mode & 0o077 == 0


def test_a_change_is_told_by_key_with_both_values() -> None:
    before = {"train": {"steps": 600, "optimizer": {"lr": 1e-3}}}
    now = {"train": {"steps": 700, "optimizer": {"lr": 1e-3}}}
    assert describe_change(before, now, {}, {}) == "train.steps changed from 600 to 700"
    assert describe_change(before, before, {"text": "a"}, {"text": "b"}) == "its input text changed"
    assert describe_change(before, before, {"text": "a"}, {"text": "a"}) is None
