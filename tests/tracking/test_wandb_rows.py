"""What a row of metrics.jsonl becomes in W&B, whoever reads it and when."""

import json
from pathlib import Path
from typing import Any

from hpc.run.directory import append_jsonl
from hpc.tracking.rows import LOAD_EVERY, MetricsRows, load_keys, power_rows


def rows(path: Path, *lines: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    for line in lines:
        append_jsonl(path, line)
    return list(MetricsRows(path).new())


def test_a_row_keeps_its_figures_and_gets_kilowatt_hours_joules_per_token_and_its_own_time(tmp_path: Path) -> None:
    line = {"step": 3, "tokens": 50, "attempt": 1, "time": 77.5, "loss": 2.5, "mfu": None, "energy_j": 7200.0,
            "node_power_w": {"n1": 10.5, "n2": None}, "router_load": [[0.25, 0.75]],
            "router_entropy": [0.5]}  # fmt: skip
    assert rows(tmp_path / "m.jsonl", line) == [
        (0, {"step": 3, "tokens": 50, "attempt": 1, "time": 77.5, "loss": 2.5, "energy_j": 7200.0,
             "node_power_w/n1": 10.5, "router_load/layer_0/expert_0": 0.25, "router_load/layer_0/expert_1": 0.75,
             "router_entropy/layer_0": 0.5, "energy_kwh": 0.002, "j_per_token": 144.0, "_timestamp": 77.5})
    ]  # fmt: skip


def test_a_step_done_again_tells_what_it_cost_and_not_its_loss_a_second_time(tmp_path: Path) -> None:
    found = rows(
        tmp_path / "m.jsonl",
        {"step": 1, "attempt": 1, "loss": 5.0, "tokens_per_s": 7.0},
        {"step": 2, "attempt": 1, "loss": 4.0, "tokens_per_s": 8.0},
        {"step": 2, "attempt": 2, "loss": 4.0, "tokens_per_s": 9.0, "grad_norm": 1.0, "energy_j": 36.0},
        {"step": 3, "attempt": 2, "loss": 3.0},
    )
    assert [(number, row["step"], row["attempt"], row.get("loss")) for number, row in found] == [
        (0, 1, 1, 5.0), (1, 2, 1, 4.0), (2, 2, 2, None), (3, 3, 2, 3.0),
    ]  # fmt: skip
    assert found[2][1] == {"step": 2, "attempt": 2, "tokens_per_s": 9.0, "energy_j": 36.0, "energy_kwh": 1e-5,
                           "replayed": 1}  # fmt: skip


def test_a_step_that_was_rolled_back_leaves_its_loss_to_the_step_that_replaces_it(tmp_path: Path) -> None:
    found = rows(
        tmp_path / "m.jsonl",
        {"step": 4, "loss": 4.0},
        {"step": 5, "loss": 90.0, "problem": "a spike", "rolled_back_to": 3},
        {"step": 4, "loss": 4.1},
        {"step": 5, "loss": 3.9},
    )
    assert [row for _, row in found] == [
        {"step": 4, "loss": 4.0},
        {"step": 5, "problem": "a spike", "rolled_back_to": 3},
        {"step": 4, "replayed": 1},
        {"step": 5, "loss": 3.9},
    ]


def test_rows_are_numbered_as_they_lie_in_the_file_and_told_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    reader = MetricsRows(path)
    assert list(reader.new()) == []
    append_jsonl(path, {"step": 0})
    with path.open("a") as file:
        file.write('{"step": 1, "lo')  # its writer is killed, or not done yet
    assert [number for number, _ in reader.new()] == [0]
    assert list(reader.new()) == []
    append_jsonl(path, {"step": 1, "loss": 2.0})
    assert list(reader.new()) == [(1, {"step": 1, "loss": 2.0})]


def test_a_last_line_without_an_end_is_a_row_once_nobody_writes_any_more(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"step": 0}) + "\n" + json.dumps({"step": 1}))
    assert len(list(MetricsRows(path).new())) == 1
    assert len(list(MetricsRows(path).new(is_over=True))) == 2


def test_the_load_of_many_experts_is_a_histogram_per_layer_now_and_then(tmp_path: Path) -> None:
    load = [[(expert + layer) / 64 for expert in range(64)] for layer in range(48)]
    assert load_keys(load, with_load=True)["router_load/layer_47"] == {
        "_type": "histogram", "values": load[47], "bins": list(range(65)),
    }  # fmt: skip
    lines: list[dict[str, Any]] = [{"step": step, "router_load": load} for step in range(2 * LOAD_EVERY + 1)]
    found = rows(tmp_path / "m.jsonl", *lines)
    assert [number for number, row in found if len(row) == 49] == [0, LOAD_EVERY, 2 * LOAD_EVERY]
    assert [number for number, row in found if len(row) == 1] == [n for n in range(20) if n % LOAD_EVERY]


def test_a_stage_without_steps_has_a_row_a_second_with_the_watts_of_its_nodes(tmp_path: Path) -> None:
    def sample(host: str, attempt: int, time: float, joules: float | None, watts: float | None) -> None:
        append_jsonl(tmp_path / f"energy-{host}.jsonl", {"event": "sample", "attempt": attempt, "time": time,
                                                         "total_energy_j": joules, "total_power_w": watts})  # fmt: skip

    sample("n1", 1, 10.2, 5.0, 50.0)
    sample("n2", 1, 10.9, 7.0, 70.0)
    sample("n1", 1, 11.2, 55.0, 50.0)
    sample("n1", 2, 20.0, 3.0, 30.0)
    sample("n2", 2, 20.5, None, None)
    assert list(power_rows(tmp_path)) == [
        {"step": 0, "attempt": 1, "time": 10.0, "node_power_w": {"n1": 50.0, "n2": 70.0},
         "node_energy_j": {"n1": 5.0, "n2": 7.0}, "energy_j": 12.0},
        {"step": 1, "attempt": 1, "time": 11.0, "node_power_w": {"n1": 50.0},
         "node_energy_j": {"n1": 55.0, "n2": 7.0}, "energy_j": 62.0},
        {"step": 2, "attempt": 2, "time": 20.0, "node_power_w": {"n1": 30.0, "n2": None},
         "node_energy_j": {"n1": 58.0, "n2": 7.0}, "energy_j": 65.0},
    ]  # fmt: skip
