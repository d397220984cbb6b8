"""A disk that has no room for the next checkpoint: said with both numbers, nothing lost, and it goes on."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Launch


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for one checkpoint of 2.5 MB beside the rest."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_ends_the_stage_in_one_line_and_the_next_run_goes_on(
    small: Path, disk: Path, launch: Launch
) -> None:
    command = ["run", small, "--set", f"run_root={disk}"]
    result = launch(*command)
    assert result.returncode == 5, result.stderr
    assert "error: stage 'pretrain': a checkpoint takes" in result.stderr
    assert "MB free: free some space, lower train.keep_checkpoints = 2, or --set run_root=DIR" in result.stderr
    assert result.stderr.count("\n") == 1
    stage = disk / "small/stages/pretrain"
    kept = sorted(path.name for path in stage.glob("checkpoints/step-*"))
    assert kept, "the first one fits"

    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    result = launch(*command)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert next(row["step"] for row in rows if row["attempt"] == 2) == int(kept[-1][5:]) + 1
