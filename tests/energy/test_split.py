"""The ledger and goodput against made-up lives of stages whose true split is known to the last joule."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from hpc.energy.goodput import PARTS, run_goodput, stage_goodput
from hpc.energy.ledger import run_ledger, stage_ledger
from tests.energy.life import TOKENS_PER_STEP, Life

EIGHTHS = st.integers(0, 40).map(lambda number: number / 8)
SOME = st.integers(1, 40).map(lambda number: number / 8)
FATES = ("killed", "failed", "stopped", "node lost", "killed without end lines")

ATTEMPT = st.fixed_dictionaries(
    {
        "start": SOME,
        "compile": SOME,
        "steps": st.lists(SOME, max_size=9),
        "save_every": st.integers(1, 4),
        "save": EIGHTHS,
        "roll_back_after": st.none() | st.integers(1, 8),
        "tail": SOME,
        "fate": st.sampled_from(FATES),
        "gap": EIGHTHS,
        "resume_older": st.booleans(),
    }
)


def live(life: Life, attempts: list[dict[str, Any]], *, is_finished: bool) -> None:
    """Let a stage go through attempts; the last one finishes, or all ended early."""
    life.event("submit")
    life.passes(2.0, "queue")
    for number, one in enumerate(attempts):
        is_last = number + 1 == len(attempts)
        older = 0 if one["resume_older"] and number else None
        life.begin(one["start"], one["compile"], resume_from=older)
        for done, seconds in enumerate(one["steps"], start=1):
            life.do_step(seconds)
            if life.step % one["save_every"] == 0 and life.step > life.checkpoint:
                life.save(one["save"])
            if one["roll_back_after"] == done and life.checkpoint and life.checkpoint <= life.step:
                life.roll_back(seconds)
        if is_last and is_finished:
            life.finish()
            return
        outcome = one["fate"] if one["fate"] in ("failed", "stopped") else None
        silent = list(life.watts)[-1] if one["fate"] == "node lost" and len(life.watts) > 1 else None
        life.end(one["tail"], outcome, silent=silent, has_end=one["fate"] != "killed without end lines")
        if not outcome or not is_last:
            life.event("verdict", attempt=life.attempt, action="requeue", reason=f"it was {one['fate']}", checkpoint=0)
        if not is_last:
            life.passes(one["gap"], "queue")
    life.throw_after(life.checkpoint)


@settings(max_examples=80, deadline=None)
@given(
    attempts=st.lists(ATTEMPT, min_size=1, max_size=4),
    is_finished=st.booleans(),
    watts=st.lists(st.integers(1, 400), min_size=1, max_size=3),
)
def test_useful_and_lost_add_up_to_the_total_and_match_the_truth(
    attempts: list[dict[str, Any]], is_finished: bool, watts: list[int]
) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        life = Life(folder / "run/stages/pretrain", {f"n{n}": w for n, w in enumerate(watts)})
        live(life, attempts, is_finished=is_finished)
        ledger, goodput = stage_ledger(life.root), stage_goodput(life.root)
        assert goodput is not None
        assert ledger.energy_j == life.joules()
        assert ledger.useful_j is not None
        assert ledger.lost_j is not None
        assert ledger.useful_j + ledger.lost_j == ledger.energy_j
        for kind, label in (("replayed_steps", "replay"), ("failed_attempt", "lost")):
            assert sum(work.energy_j or 0 for work in ledger.lost if work.kind == kind) == life.joules(label)
        assert sum(work.steps or 0 for work in ledger.lost) == life.dropped_steps()
        assert sum(node.energy_j or 0 for node in ledger.nodes) == ledger.energy_j

        assert sum(goodput.seconds.values()) == goodput.wall_s
        assert goodput.seconds == {part: life.seconds(part) for part in PARTS}
        assert sum(joules or 0 for joules in goodput.energy_j.values()) == ledger.energy_j
        assert {part: joules or 0 for part, joules in goodput.energy_j.items()} == {
            part: life.joules(part) for part in PARTS
        }
    finally:
        shutil.rmtree(folder)


@settings(max_examples=25, deadline=None)
@given(
    stages=st.lists(st.tuples(st.lists(ATTEMPT, min_size=1, max_size=2), st.booleans()), min_size=1, max_size=3),
    superseded=st.lists(st.lists(ATTEMPT, min_size=1, max_size=2), max_size=2),
    delay=EIGHTHS,
)
def test_a_run_is_the_sum_of_its_stages_superseded_ones_too_and_its_parts_fill_the_wall_time(
    stages: list[tuple[list[dict[str, Any]], bool]], superseded: list[list[dict[str, Any]]], delay: float
) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        lives, aside = [], []
        for number, (attempts, is_finished) in enumerate(stages):  # they overlap, or follow each other
            life = Life(folder / f"run/stages/s{number}", {"n1": 8, "n2": 16}, now=1000.0 + number * delay)
            live(life, attempts, is_finished=is_finished)
            lives.append(life)
        for number, attempts in enumerate(superseded):
            life = Life(folder / f"run/superseded/s0-{number + 1}", {"n1": 8}, now=500.0)
            live(life, attempts, is_finished=True)
            aside.append(life)
        ledger, goodput = run_ledger(folder / "run"), run_goodput(folder / "run")
        assert goodput is not None
        assert ledger.energy_j == sum(life.joules() for life in [*lives, *aside])
        assert ledger.useful_j is not None
        assert ledger.lost_j is not None
        assert ledger.useful_j + ledger.lost_j == ledger.energy_j
        lost = sum(life.joules("replay", "lost") for life in lives) + sum(life.joules() for life in aside)
        assert ledger.lost_j == lost

        begin = min(life.chunks[0].start for life in [*lives, *aside])
        assert goodput.wall_s == max(life.now for life in [*lives, *aside]) - begin
        assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_s, abs=1e-9)
        assert sum(joules or 0 for joules in goodput.energy_j.values()) == ledger.energy_j
        lost_parts = (goodput.energy_j["lost"] or 0) + (goodput.energy_j["replay"] or 0)
        assert lost_parts == ledger.lost_j
        if len(lives) == 1 and not aside:
            assert goodput.seconds == {part: life.seconds(part) for part in PARTS for life in lives}
    finally:
        shutil.rmtree(folder)


def test_two_stages_at_once_share_each_second_and_the_queue_counts_only_while_nothing_runs(tmp_path: Path) -> None:
    first = Life(tmp_path / "run/stages/a", {"n1": 8}, kind="prepare")
    first.passes(0.0, "queue")
    first.begin(1.0, 0.0)
    first.passes(7.0, "productive")
    first.finish(0.0)  # from 1000 to 1008
    second = Life(tmp_path / "run/stages/b", {"n2": 8}, kind="prepare", now=1002.0)
    second.event("submit")
    second.passes(2.0, "queue")  # while the first one runs
    second.begin(2.0, 0.0)  # 1004 to 1006
    second.passes(6.0, "productive")
    second.finish(0.0)  # to 1012
    goodput = run_goodput(tmp_path / "run")
    assert goodput is not None
    assert goodput.wall_s == 12.0
    assert goodput.seconds["queue"] == 0.0
    assert goodput.seconds["start"] == 1.0 + 2.0 / 2
    assert goodput.seconds["productive"] == 10.0
    assert goodput.goodput == 10.0 / 12.0


def test_a_stage_without_checkpoints_loses_the_whole_attempt_that_failed(tmp_path: Path) -> None:
    life = Life(tmp_path / "stages/merge", {"n1": 8}, kind="merge")
    life.begin(1.0, 0.0)
    life.passes(7.0, "productive")
    life.throw_after(0)
    life.end(2.0, "failed")
    life.passes(1.0, "between")
    life.begin(1.0, 0.0)
    life.passes(3.0, "productive")
    life.finish()
    ledger = stage_ledger(life.root)
    assert [(work.kind, work.attempt, work.steps, work.reason) for work in ledger.lost] == [
        ("failed_attempt", 1, None, "it failed")
    ]
    assert ledger.lost_j == 8 * (1.0 + 7.0 + 2.0 - 0.125)
    assert ledger.energy_j == life.joules()
    assert ledger.kind == "merge"


def test_tokens_that_stayed_are_those_of_the_newest_step_that_stayed(tmp_path: Path) -> None:
    life = Life(tmp_path / "stages/pretrain", {"n1": 8})
    life.begin(1.0, 1.0)
    for _ in range(4):
        life.do_step(1.0)
    life.save(0.5)
    life.do_step(1.0)
    life.end(1.0, None)
    life.passes(1.0, "queue")
    life.begin(1.0, 1.0)
    life.end(1.0, "stopped")
    ledger = stage_ledger(life.root)
    assert ledger.tokens == 4 * TOKENS_PER_STEP
    replayed = next(work for work in ledger.lost if work.kind == "replayed_steps")
    assert (replayed.steps, replayed.tokens, replayed.attempt) == (1, TOKENS_PER_STEP, 1)


def test_the_joules_of_an_attempt_that_lives_on_beside_its_successor_count_once(tmp_path: Path) -> None:
    def row(event: str, attempt: int, time: float, joules: float) -> dict[str, Any]:
        return {"event": event, "attempt": attempt, "time": time, "energy_j": {"m": joules}, "total_energy_j": joules}

    rows = [
        row("start", 1, 100, 0), row("sample", 1, 110, 100), row("start", 2, 120, 0), row("sample", 1, 120, 200),
        row("sample", 2, 130, 100), row("sample", 1, 130, 300), row("end", 1, 140, 400), row("end", 2, 140, 200),
    ]  # fmt: skip
    (tmp_path / "energy-n1.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    ledger = stage_ledger(tmp_path)
    assert [(node.attempt, node.energy_j) for node in ledger.nodes] == [(1, 200), (2, 200)]
    assert ledger.energy_j == 400
