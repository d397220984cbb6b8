"""Energy of other runs' artifacts: once each, all of it unless told otherwise, and still known when they are gone."""

import shutil
from pathlib import Path

import pytest

from hpc.energy.ledger import run_ledger, stage_ledger
from hpc.energy.lineage import ancestry, record_origin
from hpc.errors import ArtifactError
from hpc.run.directory import StageDirectory
from hpc.run.receipt import Receipt, list_files, write_receipt
from tests.energy.life import Life


def made(run: Path, name: str, watts: int, content: str, inputs: tuple[str, ...] = ()) -> StageDirectory:
    """A finished stage of 8 s at that power, less the eighth of a second before its sampler looks."""
    life = Life(run / "stages" / name, {"n1": watts}, kind="prepare")
    life.begin(1.0, 0.0)
    life.passes(7.0, "productive")
    life.finish(0.0)
    directory = StageDirectory(life.root)
    directory.artifact.mkdir()
    (directory.artifact / "data").write_text(content)
    files = list_files(directory.artifact)
    digests = {need: "x" for need in inputs}
    receipt = Receipt(name, "prepare", {}, digests, files, {}, {}, {}, {}, 8.0, 1)
    write_receipt(directory, receipt)
    return directory


SECONDS = 7.875


def test_a_run_states_the_energy_of_its_base_and_of_what_that_was_made_from_once_each(tmp_path: Path) -> None:
    base, ours = tmp_path / "base", tmp_path / "ours"
    made(base, "text", 8, "text")
    model = made(base, "pretrain", 80, "weights", ("text",))
    made(base, "unrelated", 800, "something else")
    for name in ("lora-a", "lora-b"):  # both start from it: it counts once
        record_origin(made(ours, name, 16, name), model.root, str(ours))
    ledger = run_ledger(ours)
    assert ledger.energy_j == 2 * 16 * SECONDS, "what a run stands on is not its own"
    assert [(one.stage, one.energy_j, one.share) for one in ledger.inherited] == [
        ("pretrain", 80 * SECONDS, 1.0),
        ("text", 8 * SECONDS, 1.0),
    ]
    assert ledger.inherited_j == 88 * SECONDS
    assert {one.run for one in ledger.inherited} == {str(base)}

    shutil.rmtree(base)
    assert run_ledger(ours).inherited == ledger.inherited, "known even when the other run is gone"


def test_every_user_states_the_full_amount_and_the_number_of_users_unless_told_a_share(tmp_path: Path) -> None:
    model = made(tmp_path / "base", "pretrain", 80, "weights")
    first, second, third = (made(tmp_path / name, "lora", 16, name) for name in ("one", "two", "three"))
    record_origin(first, model.root, str(tmp_path / "one"))
    record_origin(second, model.root, str(tmp_path / "two"))
    record_origin(second, model.root, str(tmp_path / "two"))  # a second attempt is no second user
    record_origin(third, model.root, str(tmp_path / "three"), share=0.25)
    stated = [run_ledger(tmp_path / name).inherited[0] for name in ("one", "two", "three")]
    assert [one.share for one in stated] == [1.0, 1.0, 0.25]
    assert [one.energy_j for one in stated] == [80 * SECONDS] * 3
    assert stated[0].reason == "embodied: all of it stated here"
    assert stated[1].reason == "embodied, shared by 2 known runs: all of it stated here"
    assert stated[2].reason == "embodied, shared by 3 known runs: 25% of it stated here"
    assert run_ledger(tmp_path / "three").inherited_j == 20 * SECONDS


def test_a_chain_of_three_runs_passes_its_energy_on_and_one_that_made_the_same_text_itself_inherits_none(
    tmp_path: Path,
) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    made(first, "text", 8, "text")
    model = made(first, "pretrain", 80, "weights", ("text",))
    merged = made(second, "merge", 4, "merged")
    record_origin(merged, model.root, str(second))
    made(third, "text", 12, "text")  # byte for byte the same artifact
    record_origin(made(third, "lora", 16, "adapter", ("text",)), merged.root, str(third))
    ledger = run_ledger(third)
    assert [(one.stage, one.energy_j) for one in ledger.inherited] == [
        ("merge", 4 * SECONDS),
        ("pretrain", 80 * SECONDS),
    ]
    assert ledger.energy_j == 28 * SECONDS


def test_lost_work_of_the_base_is_part_of_what_it_took(tmp_path: Path) -> None:
    life = Life(tmp_path / "base/stages/text", {"n1": 8}, kind="prepare")
    life.begin(1.0, 0.0)
    life.end(3.0, "failed")
    life.begin(1.0, 0.0)
    life.finish(0.0)
    assert (stage_ledger(life.root).lost_j or 0) > 0
    assert ancestry(life.root)[0].energy_j == life.joules()


def test_a_base_that_is_not_done_is_refused_by_name(tmp_path: Path) -> None:
    life = Life(tmp_path / "base/stages/pretrain", {"n1": 8})
    with pytest.raises(ArtifactError, match="has no receipt beside its artifact: name the folder"):
        record_origin(StageDirectory(tmp_path), life.root, "ours")
