"""What a person reads while a stage runs."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from hpc.energy.meter import Power
from hpc.run.directory import RunDirectory, StageDirectory
from slurm.live import View, describe
from slurm.status import ChainStatus, StageStatus, show

PROGRESS = {"attempt": 1, "text": "training", "done": 100, "total": 400, "loss": 5.1234, "tokens_per_s": 3600.4,
            "seconds_left": 130.0}  # fmt: skip


def test_a_line_has_step_loss_speed_power_and_time_left() -> None:
    text = describe(PROGRESS, Power(15.6, is_estimated=True))
    assert text == "training  100/400  loss 5.123  3,600 tokens/s  16 W (estimated)  2m10s left"


def test_measured_power_is_not_called_estimated_and_unknown_power_is_left_out() -> None:
    assert "16 W  " in describe(PROGRESS, Power(15.6, is_estimated=False))
    assert " W" not in describe(PROGRESS, None)


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = StageDirectory(tmp_path)
    directory.progress.write_text(json.dumps(PROGRESS))
    with View(["pretrain"], Console(file=io.StringIO())) as view:
        view.say("pretrain", "started")
        view.update("pretrain", directory, attempt=1)
        view.update("pretrain", directory, attempt=2)  # another attempt's word is not shown
    assert capsys.readouterr().out.splitlines() == [
        "pretrain: started",
        "pretrain: training  100/400  loss 5.123  3,600 tokens/s  2m10s left",
    ]


def test_a_terminal_shows_every_stage_with_a_bar_for_the_running_one(tmp_path: Path) -> None:
    directory = StageDirectory(tmp_path)
    directory.progress.write_text(json.dumps(PROGRESS))
    screen = io.StringIO()
    with View(["text", "pretrain"], Console(file=screen, force_terminal=True, width=120)) as view:
        view.say("text", "done")
        view.update("pretrain", directory, attempt=1)
    shown = screen.getvalue()
    assert "text" in shown
    assert "done" in shown
    assert "loss 5.123" in shown
    assert "━" in shown


def test_the_words_of_a_library_are_no_markup(tmp_path: Path) -> None:
    stage = StageStatus("pretrain", "pretrain", (), "failed", "rank 0: [/a/pair.cc:537] reset", "7", 1, None, False)
    page = io.StringIO()
    show(ChainStatus(RunDirectory(tmp_path), "run", (stage,), ("see [/b]",)), Console(file=page, width=160))
    assert "[/a/pair.cc:537] reset" in page.getvalue()
    assert "see [/b]" in page.getvalue()
