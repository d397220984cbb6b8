"""Every rank killed at all it does to files during a save: the last good checkpoint is loaded, and it is said."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

Case = dict[str, Any]
Told = dict[str, Any]
SIGKILL = -9


def matrix(folder: Path, *options: str, timeout: float) -> Told:
    """`seen`: what each rank does during a save; `cases`: what became of each; `full` (tests/train/faults.py)."""
    command = [sys.executable, "-m", "tests.train.faults", str(folder / "out.json"), str(folder / "run"), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr
    told: Told = json.loads((folder / "out.json").read_text())
    return told


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return matrix(tmp_path_factory.mktemp("small"), timeout=300)


def wrong(case: Case) -> str | None:
    """What a case shows that it must not."""
    newest = 20 if case["published"] or case["again"] else 10
    if case["statuses"][case["victim"]] != SIGKILL:
        return "nobody was killed"
    if case["statuses"][1 - case["victim"]] not in (0, 1):
        return "the other rank hung or was lost"
    if case["resumed"] != [0, 0]:
        return "the next attempt did not get going"
    if case["step"] != newest:
        return f"step {case['step']} was loaded, {newest} is the last good one"
    if not case["right"]:
        return "other values were loaded than were saved"
    if bool(case["said"]) != case["unfinished"]:
        return f"said: {case['said']}, with an unfinished save: {case['unfinished']}"
    if case["left"] != ["committed.jsonl", "step-00000030"]:
        return f"what lies around after the next save: {case['left']}"
    return None


def failures(cases: list[Case]) -> list[str]:
    return [
        f"rank {case['victim']} killed before rank {case['observer']}'s {case['what']!r}: {problem}\n{case['log']}"
        for case in cases
        if (problem := wrong(case))
    ]


def test_killed_at_any_point_of_a_save_the_last_good_checkpoint_is_loaded(
    small: Told,
) -> None:
    cases = small["cases"]
    assert not (told := failures(cases)), "\n".join(told)
    print(f"{len(cases)} kills, {sum(case['published'] for case in cases)} after the new one was published")


def test_the_matrix_reaches_every_rank_and_every_part_of_a_save(small: Told) -> None:
    seen, cases = small["seen"], small["cases"]
    for rank in (0, 1):
        kinds = {case["what"].split(".")[0] for case in cases if case["observer"] == case["victim"] == rank}
        name = f"fragments-{rank:05d}"
        assert {f"open {name}", "hash block", f"fsync {name}", "hash end", f"rename part-{rank:05d}"} <= kinds, kinds
    at_first = {case["what"] for case in cases if case["observer"] == 0}
    for needed in ("rename MANIFEST.json", "rename step-00000020", "fsync checkpoints", "open committed.jsonl",
                   "rename .pruned-step-00000010", "rmdir .pruned-step-00000010"):  # fmt: skip
        assert needed in at_first
        assert {case["victim"] for case in cases if case["what"] == needed} == {0, 1}
    assert seen[0].count("hash block") > 4, "the data must be cut into pieces, so that a kill falls between them"


def test_what_is_published_stays_published_and_what_is_not_is_never_taken(
    small: Told,
) -> None:
    seen, cases = small["seen"], small["cases"]
    own = [case for case in cases if case["observer"] == case["victim"] == 0 and not case["again"]]
    order = [case["step"] for case in own]
    renamed = seen[0].index("rename step-00000020")
    assert order == [10] * (renamed + 1) + [20] * (len(order) - renamed - 1)


def test_a_rank_that_cannot_write_ends_the_save_on_all_ranks_in_the_same_words(small: Told) -> None:
    first, second = small["full"]
    assert first["error"] == second["error"]
    assert "No space left on device; free some space or --set run_root=DIR" in first["error"]
    assert first["left"] == ["committed.jsonl", "step-00000010"], "what is half written must be gone"
    assert first["step"] == second["step"] == 10
    assert max(first["seconds"], second["seconds"]) < 20, "rank 0 must not wait for a part that will never come"


@pytest.mark.slow
def test_the_same_with_a_real_engine_in_training(tmp_path: Path) -> None:
    cases = matrix(tmp_path, "--engine", timeout=3000)["cases"]
    assert not (told := failures(cases)), "\n".join(told)
    print(f"{len(cases)} kills of a real engine, {sum(case['published'] for case in cases)} after publishing")
