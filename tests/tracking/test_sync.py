"""`launch.py sync`: what is missing at the server goes there, once, however often it is interrupted."""

import time
from pathlib import Path

import pytest

from hpc.bench.wandb_server import Server
from hpc.errors import ConfigError, TrackingError
from hpc.run.attempts import record_end
from hpc.run.directory import StageDirectory, append_jsonl
from hpc.tracking.sync import Synced, sync
from tests.conftest import Launch
from tests.tracking.conftest import at, expected, same, streamed
from tests.tracking.trainer import begin, make_receipt, ticket, write_rows


def offline_stage(root: Path, *, mode: str = "offline", produces: str = "model", rows: int = 30) -> Path:
    """A stage after two attempts, which did steps 11 to 20 twice."""
    for attempt, first, last in ((1, 0, 20), (2, 11, rows)):
        assert begin(root) == attempt
        write_rows(root, first, last, attempt)
    (root / "wandb").mkdir()
    ticket(root, mode, produces).write(root)
    return root


def done_chain(run: Path) -> tuple[Path, Path]:
    """Two finished stages, of which the second read what the first made."""
    text = offline_stage(run / "stages" / "text", produces="tokens", rows=25)
    digest = make_receipt(text, {}).digest
    pretrain = offline_stage(run / "stages" / "pretrain")
    make_receipt(pretrain, {"text": digest})
    for root in (text, pretrain):
        record_end(StageDirectory(root), 2, 0, "done")
    return text, pretrain


def test_a_chain_arrives_row_by_row_with_its_edges_and_a_second_call_sends_nothing(
    tmp_path: Path, server: Server, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(server, monkeypatch)
    text, pretrain = done_chain(tmp_path / "run")
    result = launch("sync", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "text: 36 of 36 rows sent, 1 artifact edges", "pretrain: 41 of 41 rows sent, 2 artifact edges",
    ]  # fmt: skip
    same(streamed(server, "id-text"), expected(text))
    same(streamed(server, "id-pretrain"), expected(pretrain))
    assert [(a.name, a.kind, a.made_by, a.used_by, a.committed) for a in server.artifacts] == [
        ("chain-text", "tokens", {"id-text"}, {"id-pretrain"}, True),
        ("chain-pretrain", "model", {"id-pretrain"}, set(), True),
    ]
    run = server.runs["id-pretrain"]
    assert (run.exit_code, run.summary["heldout_loss"], run.fields["groupName"]) == (0, 5.5, "chain")
    assert [(each["attempt"], each["outcome"]) for each in run.config["attempts"]] == [(1, "lost"), (2, "done")]
    assert server.complaints == []
    heard = len(server.operations)
    result = launch("sync", tmp_path / "run")
    assert result.stdout.splitlines() == [
        "text: nothing new, all 36 rows are there", "pretrain: nothing new, all 41 rows are there",
    ]  # fmt: skip
    assert len(server.operations) == heard


def test_a_sync_that_is_cut_short_is_finished_by_the_next_one_and_no_row_comes_twice(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(server, monkeypatch)
    root = offline_stage(tmp_path / "stages" / "pretrain")
    server.mood = "mute"  # it takes rows, and whoever sent them never hears of it
    told: list[Synced] = []
    with pytest.raises(TrackingError, match="run the same command again"):
        sync([tmp_path], 8, told.append)
    assert [(each.state, each.rows) for each in told] == [("left", 41)]
    assert "not done within 8 s" in told[0].note
    arrived = len(server.runs["id-pretrain"].history)
    server.mood = "well"
    write_rows(root, 31, 33, 2)
    assert [(each.sent, each.rows) for each in sync([tmp_path], 60, told.append)] == [(44 - arrived, 44)]
    same(streamed(server, "id-pretrain"), expected(root))
    assert server.complaints == []


def test_a_stage_that_runs_is_sent_as_far_as_it_is_and_left_alone_when_it_is_online(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(server, monkeypatch)
    alone, offline = tmp_path / "stages" / "alone", tmp_path / "stages" / "offline"
    for root, mode in ((alone, "online"), (offline, "offline")):
        offline_stage(root, mode=mode)
        append_jsonl(root / "energy-n1.jsonl", {"event": "sample", "attempt": 2, "time": time.time(), "energy_j": {},
                                                "total_energy_j": 1.0, "total_power_w": 1.0})  # fmt: skip
    with (offline / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')  # the trainer is at it
    told = sync([tmp_path], 60, print)
    assert [(each.stage, each.state, each.sent) for each in told] == [("alone", "skipped", 0), ("offline", "sent", 41)]
    assert "it is running" in str(told[1])
    assert list(server.runs) == ["id-offline"]
    assert server.runs["id-offline"].exit_code is None, "a run that goes on is not finished"


def test_a_server_that_is_away_is_told_in_one_line_and_nothing_is_lost(
    tmp_path: Path, server: Server, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(server, monkeypatch)
    server.mood = "error"
    done_chain(tmp_path / "run")
    result = launch("sync", tmp_path / "run")
    assert result.returncode == 13
    assert result.stdout.splitlines()[0] == f"text: left: {server.url} does not answer (HTTP 500)"
    assert result.stderr.startswith("error: 2 of 2 stages are not complete")
    assert result.stderr.count("\n") == 1


def test_a_folder_without_a_mirrored_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.wandb was disabled"):
        sync([tmp_path], 60, print)
