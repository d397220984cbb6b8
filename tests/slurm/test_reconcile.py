"""sacct's energy beside the ledger's, without a Slurm: what it prints is put in its place."""

import io
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from hpc.energy.reconcile import with_wandb
from hpc.run.directory import RunDirectory
from slurm import commands
from slurm.ledger import look, show
from tests.energy.life import Life

UNDERFLOW = "18446744073707552768"


def test_only_attempts_that_slurm_has_a_figure_of_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(tmp_path / "run/stages/pretrain", {"n1": 8, "n2": 16})
    for restart in range(3):
        life.begin(1.0, 1.0)
        life.do_step(6.0 + restart)
        life.end(1.0, None if restart < 2 else "stopped")
        life.event("verdict", attempt=life.attempt, action="requeue", reason="[/odd/words] of a library")
        life.passes(1.0, "queue")
    starts = (life.root / "attempts.jsonl").read_text().replace('"restart": 0', '"restart": {}').split("{}")
    text = "".join(f"{part}{number}" for number, part in enumerate(starts[:-1])) + starts[-1]
    (life.root / "attempts.jsonl").write_text(text)
    run = RunDirectory(tmp_path / "run")
    run.submissions.write_text('{"event": "submit", "jobs": ["7"], "stages": ["pretrain"]}\n')

    def answer(*words: str, **_: object) -> "subprocess.CompletedProcess[str]":
        assert words[0] == "sacct"
        assert {"--allocations", "--duplicates"} <= set(words), "rows of steps hold the same energy again"
        return subprocess.CompletedProcess(words, 0, f"7|\n7|{UNDERFLOW}\n7|300\n", "")

    monkeypatch.setattr(commands, "call", answer)
    ledger = look(run)
    third = sum(node.energy_j or 0 for node in ledger.stages[0].nodes if node.attempt == 3)
    source = ledger.reconciled[0]
    assert (source.theirs_j, source.ours_j, source.difference_j) == (300.0, third, 300.0 - third)
    assert "2 attempts without a figure are left out on both sides" in source.note

    run.config.write_text("")
    show(run, ledger, Console(file=(page := io.StringIO()), width=200))
    words = page.getvalue()
    assert "lost in failed attempt: [/odd/words] of a library" in words, "rich takes no part of it for markup"
    assert "sacct: 0.0833 Wh beside our" in words
    assert "complete: every node" in words

    monkeypatch.setattr(commands, "call", lambda *words, **_: subprocess.CompletedProcess(words, 1, "", "no slurmdbd"))
    assert look(run).reconciled[0].theirs_j is None


def test_wandbs_gpu_counters_stand_beside_ours_of_the_same_scope() -> None:
    class Node:
        by_counter = {"gpu0": 100.0, "gpu1": 50.0, "package-0": 1000.0, "gpu2": None}
        scopes = {"gpu0": "gpu", "gpu1": "gpu", "package-0": "package", "gpu2": "gpu"}

    found = with_wandb([Node()], 147.0)
    assert (found.ours_j, found.difference_j) == (150.0, -3.0)
    assert with_wandb([], 147.0).difference_j is None
