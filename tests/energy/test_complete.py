"""When a total is complete, and what it says when it is not."""

import json
from pathlib import Path

import pytest

from hpc.energy.curves import read_samples
from hpc.energy.goodput import run_goodput, stage_goodput
from hpc.energy.ledger import run_ledger, stage_ledger
from hpc.run.directory import RunDirectory
from tests.energy.life import Life

FOUR = {"n1": 8, "n2": 16, "n3": 24, "n4": 32}


def one_attempt(folder: Path, tail_s: float, *, silent: str | None = None, has_end: bool = True) -> Life:
    life = Life(folder / "stages/pretrain", FOUR)
    life.begin(1.0, 1.0)
    life.do_step(6.0)
    life.end(tail_s, "failed", silent=silent, has_end=has_end)
    return life


def test_a_killed_node_counts_to_its_last_sample_and_is_named_when_the_attempt_went_on_without_it(
    tmp_path: Path,
) -> None:
    life = one_attempt(tmp_path, 30.0, silent="n4")
    life.event("node", attempt=1, node="n4")
    ledger = stage_ledger(life.root)
    assert ledger.missing == ("attempt 1: node n4 (declared dead) reported until 30 s before the attempt ended",)
    assert ledger.energy_j == (8 + 16 + 24) * 38.375 + 32 * 8.375
    assert [node.host for node in ledger.nodes if not node.complete] == ["n4"]
    assert not run_ledger(tmp_path).is_complete
    assert run_ledger(tmp_path).missing[0].startswith("pretrain: attempt 1: node n4")


def test_an_attempt_that_ended_with_its_killed_node_is_complete(tmp_path: Path) -> None:
    life = one_attempt(tmp_path, 4.0, silent="n4")
    assert stage_ledger(life.root).missing == ()


def test_a_node_that_reported_nothing_or_has_no_counter_is_named_and_not_filled_in(tmp_path: Path) -> None:
    life = one_attempt(tmp_path, 2.0)
    whole = stage_ledger(life.root).energy_j
    (life.root / "energy-n3.jsonl").unlink()
    rows = [json.loads(line) for line in (life.root / "energy-n2.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        row.update(total_energy_j=None, energy_j={"meter": None})
    (life.root / "energy-n2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = stage_ledger(life.root)
    assert ledger.missing == (
        "attempt 1: node n2 has no energy counter that can be read",
        "attempt 1: node n3 reported nothing",
    )
    assert whole is not None
    assert ledger.energy_j == whole - (16 + 24) * 10.375
    assert next(node for node in ledger.nodes if node.host == "n2").energy_j is None
    assert next(node for node in ledger.nodes if node.host == "n2").by_counter == {"meter": None}


def test_a_torn_last_line_is_left_out_and_a_stage_that_runs_is_read_as_far_as_it_has_come(tmp_path: Path) -> None:
    life = Life(tmp_path / "stages/pretrain", FOUR)
    life.event("submit")
    life.passes(3.0, "queue")
    life.begin(1.0, 1.0)
    life.do_step(6.0)
    life.end(0.5, None, has_end=False)  # samples so far
    with (life.root / "energy-n1.jsonl").open("a") as file:
        file.write('{"event": "sample", "att')
    ledger = run_ledger(tmp_path)
    assert ledger.is_complete
    assert ledger.lost_j == 0.0
    assert ledger.energy_j == life.joules()
    goodput = run_goodput(tmp_path)
    assert goodput is not None
    assert goodput.seconds["queue"] == 3.0


def test_nothing_at_all_is_none_and_an_unsampled_part_is_none_too(tmp_path: Path) -> None:
    assert run_goodput(tmp_path) is None
    empty = run_ledger(tmp_path)
    assert (empty.energy_j, empty.useful_j, empty.lost_j, empty.inherited_j) == (None, None, None, None)
    life = Life(tmp_path / "stages/pretrain", FOUR)
    life.begin(1.0, 1.0)
    life.do_step(6.0)
    assert stage_ledger(life.root).energy_j is None
    goodput = stage_goodput(life.root)
    assert goodput is not None
    assert goodput.energy_j["productive"] is None
    assert goodput.energy_j["queue"] == 0.0
    assert stage_ledger(life.root).missing == tuple(f"attempt 1: node {node} reported nothing" for node in FOUR)


def test_a_stage_made_again_while_its_job_ran_shares_its_record_and_nothing_counts_twice(tmp_path: Path) -> None:
    life = Life(tmp_path / "run/stages/pretrain", {"n1": 8})
    life.begin(1.0, 1.0)
    life.do_step(6.0)
    life.end(1.0, "stopped")
    before = life.joules()
    life.passes(1.0, "queue")
    life.begin(1.0, 1.0)  # and finds that its inputs have changed
    RunDirectory(tmp_path / "run").supersede("pretrain", attempt=2)
    life.do_step(2.0)
    life.finish(0.0)
    ledger = run_ledger(tmp_path / "run")
    assert [(stage.name, stage.missing) for stage in ledger.stages] == [
        ("pretrain", ()),
        ("pretrain (superseded 1)", ()),
    ]
    now, old = ledger.stages
    assert (old.energy_j, old.lost_j, old.useful_j, old.tokens) == (before, before, 0.0, 0)
    assert (now.energy_j, now.lost_j) == (life.joules() - before, 0.0)
    assert ledger.energy_j == pytest.approx(life.joules())


def test_what_a_sampler_had_to_say_stands_beside_its_node_and_a_note_is_no_sample(tmp_path: Path) -> None:
    rows = [
        {"event": "start", "attempt": 1, "time": 100.0, "notes": ["RAPL psys is left out"],
         "unmeasured": ["cpu", "fans"], "counters": [{"name": "gpu0", "scope": "gpu", "provenance": "measured: NVML"}]},
        {"event": "sample", "attempt": 1, "time": 101.0, "energy_j": {"gpu0": 40.0}, "total_energy_j": 40.0},
        {"event": "sample", "attempt": 1, "time": 102.0, "energy_j": {"gpu0": None}, "total_energy_j": None},
        {"event": "note", "attempt": 1, "time": 102.5, "text": "gpu0 restarted"},
        {"event": "end", "attempt": 1, "time": 103.0, "energy_j": {"gpu0": 90.0}, "total_energy_j": 90.0,
         "unsure_j": 7.0},
    ]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    lines.insert(3, lines[2][:40])  # a writer that was killed, and the line that the next one ended for it
    (tmp_path / "energy-n1.jsonl").write_text("\n".join(lines) + "\n")
    node = stage_ledger(tmp_path).nodes[0]
    assert (node.energy_j, node.complete, node.unsure_j, node.scopes) == (90.0, True, 7.0, {"gpu0": "gpu"})
    assert node.notes == ("RAPL psys is left out", "not counted: cpu, fans", "gpu0 restarted")
    series = read_samples(tmp_path)[0]
    assert [series.at(time) for time in (99, 100, 100.5, 101, 102, 102.5, 103, 200)] == [0, 0, 20, 40, 40, 65, 90, 90]
