"""Bad steps, slow ranks, silent corruption and hangs, on two real ranks through the real loop (health_worker.py)."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.config import Health
from hpc.config.train import HangBounds
from hpc.errors import Hung, StageError
from hpc.run.directory import StageDirectory, write_json
from hpc.run.task import World
from hpc.train import watchdog
from hpc.train.corruption import bit_sum, minority, verdict
from hpc.train.health import RECORD, Guard, Record, StepTimes, Word, clock
from tests.ranks import end_of, start_ranks

Told = dict[str, Any]


def launch(ranks: int, folder: Path, *scenarios: str) -> list[int | None]:
    """Run scenarios on that many ranks; returns the exit codes."""
    return end_of(start_ranks(ranks, "tests.train.health_worker", [str(folder), *scenarios], folder), 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything on two ranks, in one start of the processes; the last scenario ends them."""
    folder = tmp_path_factory.mktemp("health")
    names = ("skip", "gradient", "spike", "roll_back", "budget", "bits", "flip", "slow", "asleep")
    codes = launch(2, folder, *names)
    assert (folder / "slow-2.json").exists(), (folder / "log-0.txt").read_text()[-3000:]
    (folder / "codes.json").write_text(json.dumps(codes))
    return folder


def told(folder: Path, scenario: str) -> Told:
    found: Told = json.loads((folder / f"{scenario}-2.json").read_text())
    return found


def check_skip(found: Told) -> None:
    for layout, case in found.items():
        assert case["bad"]["outcome"] == case["good"]["outcome"] == "done", layout
        assert case["kept"] == ["changed"] * 5 + ["same"] + ["changed"] * 2, layout
        assert case["bad"]["record"]["skipped"] == [6], layout
        assert len(case["bad_losses"]) == 2, layout
        if layout.endswith("muon"):  # two undisturbed runs of it differ by as much, on a CPU
            assert case["bad_losses"] == pytest.approx(case["good_losses"], abs=1e-5), layout
        else:
            assert case["bad_losses"] == case["good_losses"], layout
            assert case["bad"]["weights"] == case["good"]["weights"], layout
        row = next(row for row in case["bad"]["rows"] if row["step"] == 6)
        assert "is a spike (the last 4:" in row["skipped"], layout
        assert row["grad_norm"] is None, layout
        assert case["bad"]["health"]["skipped_steps"] == 1, layout


def test_a_skipped_step_leaves_no_trace_under_zero_1_2_and_3(folder: Path) -> None:
    """Weights and moments are the same in every bit, and what follows is the run that never saw that batch."""
    check_skip(told(folder, "skip"))


@pytest.mark.slow
def test_a_skipped_step_leaves_no_trace_in_the_other_layouts(tmp_path: Path) -> None:
    assert launch(2, tmp_path, "skip_more") == [0, 0]
    check_skip(told(tmp_path, "skip_more"))


def test_an_infinite_gradient_norm_updates_no_rank_and_is_seen(folder: Path) -> None:
    """Under ZeRO 1, 2, 3; and when it comes from an expert that only rank 1 holds. The loss is finite."""
    found = told(folder, "gradient")
    assert set(found) == {"1", "2", "3", "expert"}
    for case, run in found.items():
        assert run["record"]["skipped"] == [6], case
        row = next(row for row in run["rows"] if row["step"] == 6)
        assert (row["skipped"], row["grad_norm"]) == ("the gradient norm is not finite", None), case
        assert row["loss"] is not None, case
        first = next(row for row in run["rows"] if row["step"] == 1)
        assert 3 < run["rows"][-1]["loss"] < first["loss"] - 0.1, "it goes on learning"
    assert found["1"]["weights"] == found["2"]["weights"]


def test_a_resumed_run_judges_by_the_window_of_the_one_before(folder: Path) -> None:
    found = told(folder, "spike")
    assert found["first"]["outcome"].startswith("Stopped: stopped at step 8")
    assert found["through"]["record"]["skipped"] == found["second"]["record"]["skipped"] == [10]
    assert found["through"]["record"]["losses"] == found["second"]["record"]["losses"]
    assert found["through"]["weights"] == found["second"]["weights"]


def test_going_back_leaves_the_data_since_the_checkpoint_out(folder: Path) -> None:
    found = told(folder, "roll_back")
    once, left = found["once"], found["left"]
    assert once["record"]["data_left_out"] == [[4, 7]]
    assert once["weights"] == left["weights"], "as if places 4 to 6 did not exist"
    back = [(row["step"], row["rolled_back_to"]) for row in once["rows"] if "rolled_back_to" in row]
    assert back == [(7, 4)]
    assert once["health"]["rollbacks"] == 1
    both = found["both"]
    assert both["record"]["data_left_out"] == [[0, 2], [6, 7]], "the first one before any update: back to the start"
    assert both["weights"] == found["left_twice"]["weights"]
    assert found["never"]["outcome"].startswith("StageError: step 5: the loss is not finite on rank 1")
    assert "max_rollbacks" in found["never"]["outcome"]


def test_too_many_bad_steps_end_the_stage_in_words(folder: Path) -> None:
    found = told(folder, "budget")
    assert found["outcome"] == (
        "StageError: step 3: the loss is not finite on rank 0, 1: lower train.optimizer.lr = 0.005; 3 of the last 3 "
        "updates are skipped, train.health.max_skipped allows 2; the checkpoints before are intact"
    )


def test_rehearsal_and_search_for_corruption_change_no_bit(folder: Path) -> None:
    for layout, case in told(folder, "bits").items():
        plain, watched = case["plain"], case["watched"]
        curves = [[(row["step"], row.get("loss"), row.get("grad_norm"), row.get("router_load"), row.get("heldout_loss"))
                   for row in run["rows"]] for run in (plain, watched)]  # fmt: skip
        assert len(curves[0]) == 6, layout
        assert curves[0] == curves[1], layout
        assert plain["weights"] == watched["weights"], layout
        assert plain["health"]["peak_memory_bytes"] > 1e8
        assert watched["health"]["peak_memory_bytes"] > 1e8


def test_one_flipped_bit_of_a_shared_weight_is_found_and_of_two_ranks_both_are_named(folder: Path) -> None:
    for run in told(folder, "flip").values():
        assert run["outcome"].startswith(
            "StageError: silent corruption at step 4: rank 0 on node-0, rank 1 on node-1 differ in "
            "model.layers.1.self_attn.k_proj.weight, and no majority tells who is wrong"
        )


@pytest.mark.slow
def test_of_three_ranks_the_one_with_the_flipped_bit_is_named(tmp_path: Path) -> None:
    assert launch(3, tmp_path, "flip") == [0, 0, 0]
    (run,) = json.loads((tmp_path / "flip-3.json").read_text()).values()
    assert "rank 2 on node-2 differs in model.layers.1.self_attn.k_proj.weight from the 2 others" in run["outcome"]


def test_the_slow_rank_has_a_name_in_the_rows_and_in_the_receipt(folder: Path) -> None:
    run = told(folder, "slow")
    reports = [row for row in run["rows"] if "slowest_rank" in row]
    assert [row["step"] for row in reports] == [4, 8]
    for row in [*reports, run["health"]]:
        assert (row["slowest_rank"], row["slowest_node"]) == (1, "node-1")
        assert (row["rank_step_median_s"], row["rank_step_p99_s"]) == (1.5, 2.0)


def test_the_clock_of_a_rank_counts_computing_and_not_waiting() -> None:
    now = clock("cpu")
    began, cpu = now(), time.thread_time()
    while time.thread_time() < cpu + 0.1:
        pass
    assert now() - began > 0.08, "computing counts (the kernel's books lag by a tick)"
    began, wall = now(), time.monotonic()
    time.sleep(0.3)
    assert (time.monotonic() - wall) - (now() - began) > 0.2, "sleep does not, however busy the machine is"


def test_a_rank_asleep_in_a_step_ends_both_with_their_stacks(folder: Path) -> None:
    assert json.loads((folder / "codes.json").read_text()) == [Hung.exit_code, Hung.exit_code]
    root = folder / "asleep"
    stacks = [(root / f"stacks-attempt-1-rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "health_worker.py" in stacks[1].split("_call_impl")[0], "where rank 1 sleeps"
    assert "in hook" in stacks[1]
    assert "distributed_c10d.py" in stacks[0], "rank 0 waits for it"
    assert "hpc/train/loop.py" in stacks[0]
    ends = [json.loads(line) for line in (root / "attempts.jsonl").read_text().splitlines()]
    assert sorted((row["rank"], row["exit_code"], row["is_crash"]) for row in ends) == [(0, 11, True), (1, 11, True)]
    assert watchdog.LAST_WORDS_S > 2 * watchdog.POLL_S, "time for the others to look twice"


class Ended(Exception):
    """Instead of the death of this process."""


def test_a_suspended_process_does_not_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A night between two ticks counts as two seconds; ten idle ticks are ten seconds."""
    now, ticks = [0.0], [0]

    def sleep(seconds: float) -> None:
        ticks[0] += 1
        now[0] += 1e5 if ticks[0] == 3 else seconds

    def ended(why: str) -> None:
        raise Ended(why)

    watched = watchdog.Watchdog(StageDirectory(tmp_path), 1, World(), HangBounds(start_s=10))
    monkeypatch.setattr(watchdog.time, "sleep", sleep)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(watched, "_end", ended)
    with pytest.raises(Ended, match=r"no progress in section 'start' for 10 s \(train.health.hang.start_s\)"):
        watched._watch()
    assert ticks[0] == 10  # one to look for the first time, one that counts twice, eight more
    (tmp_path / "hung-attempt-1").write_text('{"rank": 3, "node": "n", "why": "no progress"}')
    with pytest.raises(Ended, match="ended because another rank hung: rank 3 on n: no progress"):
        watched._watch()


def words(*losses: float) -> list[Word]:
    return [Word([loss], [0.0], False) for loss in losses]


def test_a_spike_is_judged_by_a_full_window_of_good_steps_only() -> None:
    guard = Guard(Health(window=4, spike_sigma=2.0), lr=1.0)
    for loss in (1.0, 2.0, 3.0):
        assert guard.objection(Word([1e9], [0.0], False)) is None
        guard.accept(loss)
    guard.accept(2.0)
    deviation = (2 / 3) ** 0.5  # of 1, 2, 3, 2, with n - 1
    below, above = words(2.0 + 1.99 * deviation, 2.0 + 2.01 * deviation)
    assert guard.objection(below) is None
    assert "is a spike" in str(guard.objection(above))
    guard.accept(6.0)
    assert guard.record.losses == [2.0, 3.0, 2.0, 6.0]
    assert guard.objection(Word([1.0, float("inf"), float("nan")], [0.0] * 3, False)) == (
        "the loss is not finite on rank 1, 2"
    )


def test_skips_are_counted_over_the_window_only() -> None:
    guard = Guard(Health(window=10, max_skipped=2), lr=0.1)
    for step in (1, 5, 11, 15):  # never three in ten steps
        guard.skip(step, "x")
    with pytest.raises(StageError, match=r"step 20: x: lower train.optimizer.lr = 0.1; 3 of the last 10 updates"):
        guard.skip(20, "x")


def test_the_place_of_a_step_in_the_data_jumps_over_what_is_left_out(tmp_path: Path) -> None:
    record = Record(data_left_out=[[2, 4], [4, 5], [7, 10]])
    left_out = {2, 3, 4, 7, 8, 9}
    assert [record.place(step) for step in range(6)] == [place for place in range(12) if place not in left_out][:6]
    record.losses = [0.1, 1 / 3]
    write_json(tmp_path / RECORD, asdict(record))
    assert Record.read(tmp_path) == record
    assert Record.read(tmp_path / "none") == Record()


def test_the_report_on_step_times_takes_means_over_steps_and_quantiles_over_ranks() -> None:
    times = StepTimes([f"n{rank}" for rank in range(200)])
    for factor in (1, 3):
        times.add([factor * (1 + (rank == 7) * 4 + (rank in (8, 9)) * 1) for rank in range(200)])
    assert times.report() == {
        "rank_step_median_s": 2.0, "rank_step_p99_s": 4.0, "rank_step_p99_over_median": 2.0,
        "slowest_rank": 7, "slowest_node": "n7",
    }  # fmt: skip


def test_the_minority_is_accused_and_nobody_without_a_majority() -> None:
    nodes = ["a", "b", "c", "d"]
    assert minority({0: 5, 1: 6, 2: 5, 3: 5}) == [1]
    assert minority({0: 5, 1: 6, 2: 5, 3: 6}) == []
    assert verdict("w", {0: 5, 1: 6, 2: 5}, nodes) == "rank 1 on b differs in w from the 2 others"
    assert (
        verdict("w", {1: 5, 3: 6}, nodes) == "rank 1 on b, rank 3 on d differ in w, and no majority tells who is wrong"
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_any_flipped_bit_changes_the_sum(kind: torch.dtype) -> None:
    values = torch.randn(7, generator=torch.Generator().manual_seed(0)).to(kind)
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    before = bit_sum(values)
    for bit in range(8 * values.element_size() - 1):
        values.view(width)[3] ^= 1 << bit
        assert bit_sum(values) != before
        values.view(width)[3] ^= 1 << bit
    assert bit_sum(values) == before
