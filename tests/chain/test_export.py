"""`launch.py export`: a checkpoint as a model folder, byte for byte what the stage itself would have written."""

import shutil
from pathlib import Path

from tests.conftest import Launch


def test_milestones_outlive_the_stage_and_are_exported_as_models(
    uninterrupted: Path, tmp_path: Path, launch: Launch
) -> None:
    run = tmp_path / "small"
    shutil.copytree(uninterrupted, run)
    stage = run / "stages/pretrain"
    assert sorted(path.name for path in (stage / "checkpoints").glob("step-*")) == [
        f"step-{step:08d}" for step in (10, 20, 30, 40, 50)
    ]
    out = tmp_path / "at-50"
    result = launch("export", run, "pretrain", out)
    assert result.returncode == 0, result.stderr
    assert "pretrain after 50 steps" in result.stdout
    there = {path.name for path in (stage / "artifact").iterdir()}
    assert {path.name for path in out.iterdir()} == there | {"README.md"}
    assert "# small: pretrain" in (out / "README.md").read_text()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "router_passport.json"):
        assert (out / name).read_bytes() == (stage / "artifact" / name).read_bytes(), name

    shutil.rmtree(stage / "checkpoints/step-00000040")
    (stage / "checkpoints/step-00000050/state.json").write_text("{}")
    result = launch("export", run, "pretrain", tmp_path / "newest")
    assert "pretrain after 30 steps" in result.stdout, "the newest that verifies"
    assert "This is a checkpoint after step 30 of 50." in (tmp_path / "newest/README.md").read_text()
    other = (tmp_path / "newest/model.safetensors").read_bytes()
    assert other != (out / "model.safetensors").read_bytes()

    for arguments, code, told in [
        (["pretrain", out], 2, "is there already: name a new folder"),
        (["pretrain", tmp_path / "a", "--step", "40"], 4, "no whole checkpoint of step 40 (there: 10, 20, 30, 50)"),
        (["text", tmp_path / "a"], 2, "is of kind prepare"),
        (["pretrian", tmp_path / "a"], 2, "no stage 'pretrian'"),
    ]:
        result = launch("export", run, *arguments)
        assert result.returncode == code, result.stderr
        assert told in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()
