"""One W&B run per stage, whatever happens to its attempts: real wandb, real processes, a server on this machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from hpc.bench.wandb_server import Server
from hpc.run.directory import RunDirectory, append_jsonl, read_jsonl
from hpc.tracking import wandb
from hpc.tracking.sync import sync
from slurm import ledger
from tests.tracking.conftest import (
    Start,
    at,
    bytes_on_disk,
    expected,
    history,
    kill_node,
    records,
    same,
    streamed,
    wait,
)
from tests.tracking.trainer import begin, ticket, write_rows


def test_a_requeued_and_killed_offline_run_read_back_is_metrics_jsonl_row_for_row(
    tmp_path: Path, start: Start, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "stages" / "pretrain"
    first = start(root, 0, 30, "hang")
    wait(lambda: bytes_on_disk(root) > 15_000)
    write_rows(root, 31, 40, 1)
    kill_node(first)  # within the flush interval of the last rows
    assert 0 < len(history(records(root))) < 41
    second = start(root, 26, 50, "hang")
    wait(lambda: len(read_jsonl(root / "metrics.jsonl")) == 41 + 25)
    second.kill()  # the trainer alone: its mirror sends what there is, and ends
    third = start(root, 41, 60, "done")
    assert third.wait(60) == 0
    rows = read_jsonl(root / "metrics.jsonl")
    assert len(rows) == 41 + 25 + 20
    everything = records(root)
    found = history(everything)
    same(found, expected(root))
    losses = [row["step"] for row in found if "loss" in row]
    assert losses == list(range(61))
    assert {run["run_id"] for run in everything["run"]} == {"id-pretrain"}
    at(server, monkeypatch)
    assert [(told.state, told.sent, told.rows) for told in sync([tmp_path], 60, print)] == [("sent", 86, 86)]
    same(streamed(server, "id-pretrain"), expected(root))
    assert [(each["attempt"], each["outcome"]) for each in server.runs["id-pretrain"].config["attempts"]] == [
        (1, "lost"), (2, "lost"), (3, "done"),
    ]  # fmt: skip
    assert server.complaints == []
    assert len(list(root.glob("wandb/offline-*/*.synced"))) == 3


def test_the_run_says_which_attempts_there_were_and_whether_joules_were_measured(tmp_path: Path, start: Start) -> None:
    root = tmp_path / "stages" / "pretrain"
    root.mkdir(parents=True)
    source = "estimated: CPU utilisation and a power model"
    (root / "energy-n1.jsonl").write_text(json.dumps({"event": "start", "attempt": 1, "time": 1000.0, "counters": [
        {"name": "estimate", "scope": "node", "provenance": source}]}) + "\n")  # fmt: skip
    assert start(root, 0, 3, "stopped").wait(60) == 0
    assert start(root, 4, 5, "done").wait(60) == 0
    found, config = records(root), dict[str, Any]()
    for record in [*(run["config"] for run in found["run"]), *found["config"]]:
        config |= record["update"]
    told = [(each["attempt"], each["outcome"], each["nodes"], each["ranks"]) for each in config["attempts"]]
    assert told == [(1, "stopped", ["n1", "n2"], 4), (2, "done", ["n1", "n2"], 4)]
    assert all(each["start"] < each["end"] for each in config["attempts"])
    assert config["energy"] == {"is": "estimated", "sources": {"n1": [source]}}
    assert config["run"] == "chain"
    summary: dict[str, Any] = {}
    for record in found["summary"]:
        summary |= record["update"]
    assert (summary["heldout_loss"], summary["seconds"], summary["attempts"]) == (5.5, 3.0, 2)
    assert [record["exit_code"] for record in found["exit"]] == [1, 0]


def test_an_online_run_goes_on_after_a_lost_node_and_the_server_has_every_row_once(
    tmp_path: Path, start: Start, server: Server
) -> None:
    root = tmp_path / "stages" / "pretrain"
    first = start(root, 0, 20, "hang", "online", **server.environment)
    wait(lambda: "id-pretrain" in server.runs and server.runs["id-pretrain"].history)
    kill_node(first)
    assert start(root, 11, 30, "done", "online", **server.environment).wait(60) == 0
    run = server.runs["id-pretrain"]
    same(streamed(server, "id-pretrain"), expected(root))
    assert [(each["attempt"], each["outcome"]) for each in run.config["attempts"]] == [(1, "lost"), (2, "done")]
    assert (run.fields["groupName"], run.fields["jobType"], run.exit_code) == ("chain", "pretrain", 0)
    assert run.summary["heldout_loss"] == 5.5
    assert server.complaints == []


@pytest.mark.parametrize("mood", ["drop", *(pytest.param(mood, marks=pytest.mark.slow) for mood in ("error", "hang"))])
def test_a_server_that_is_away_at_the_start_makes_the_attempt_write_offline(
    tmp_path: Path, start: Start, server: Server, mood: Any
) -> None:
    server.mood = mood
    root = tmp_path / "stages" / "pretrain"
    process = start(root, 0, 5, "done", "online", **server.environment)
    assert process.wait(60) == 0
    same(history(records(root)), expected(root))
    assert "going on offline" in (root / "wandb/mirror.log").read_text()
    assert server.runs == {}


def test_a_stage_does_not_wait_for_a_server_that_stopped_answering(
    tmp_path: Path, start: Start, server: Server
) -> None:
    root = tmp_path / "stages" / "pretrain"
    server.mood = "mute"
    process = start(root, 0, 20, "failed", "online", patience=2.0, **server.environment)
    wait(lambda: "id-pretrain" in server.runs and server.runs["id-pretrain"].history and bytes_on_disk(root))
    (root / "go").touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "sync RUN` sends the rest" in output
    same(history(records(root)), expected(root))  # on disk


def test_the_joules_of_wandbs_own_monitor_are_the_sum_of_each_gpus_increments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wandb.gpu_energy_j(tmp_path) is None
    given = ticket(tmp_path, "offline")
    (tmp_path / "wandb").mkdir()
    given.write(tmp_path)
    counts = {"run-20260101_000000": [(10.0, 5.0), (110.0, 5.5)], "run-20260102_000000": [(500.0, 6.0), (20.0, 9.0)]}
    for name in counts:
        fragment = tmp_path / "wandb" / f"offline-{name}-{given.id}" / f"run-{given.id}.wandb"
        fragment.parent.mkdir()
        fragment.touch()

    def told(*arguments: str) -> str:
        name = Path(arguments[-1]).parent.name.removeprefix("offline-").removesuffix(f"-{given.id}")
        items = [{"cpu": 3.0, "gpu.0.energyJoules": a, "gpu.1.energyJoules": b} for a, b in counts[name]]
        return "\n".join(json.dumps({"type": "stats", "stats": {"item": item}}) for item in items)

    monkeypatch.setattr(wandb, "inspect", told)
    assert wandb.gpu_energy_j(tmp_path) == 100.0 + 0.5 + 3.0  # GPU 0 was restarted under the second attempt
    counts = {name: [] for name in counts}
    assert wandb.gpu_energy_j(tmp_path) is None


def test_the_ledger_shows_wandbs_gpu_joules_beside_ours_of_the_node_that_it_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "stages" / "pretrain"
    begin(root)
    for host, joules in (("n1", 110.0), ("n2", 999.0)):
        counters = [{"name": "gpu0", "scope": "gpu", "provenance": "measured: NVML"}]
        lines = [{"event": "start", "attempt": 1, "host": host, "time": 10.0, "counters": counters, "notes": []}]
        for event, at_s, share in (("sample", 11.0, 0.5), ("end", 12.0, 1.0)):
            lines.append({"event": event, "attempt": 1, "time": at_s, "energy_j": {"gpu0": share * joules},
                          "power_w": {"gpu0": 50.0}, "total_energy_j": share * joules,
                          "total_power_w": 50.0})  # fmt: skip
        for line in lines:
            append_jsonl(root / f"energy-{host}.jsonl", line)
    monkeypatch.setattr(ledger, "gpu_energy_j", lambda stage_root: {root: 104.0}[stage_root])
    (shown,) = ledger.look(RunDirectory(tmp_path)).reconciled
    assert (shown.name, shown.theirs_j, shown.ours_j, shown.difference_j) == ("W&B GPU counters", 104.0, 110.0, -6.0)
