"""Rehearsals as Slurm jobs, to their reports: a recipe for one node, and one for many."""

import json
from pathlib import Path

import pytest

from slurm.devcluster.cluster import Cluster
from tests.conftest import Launch

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.mark.parametrize(
    ("recipe", "stage", "nodes"), [("reuse-mixtral-8x7b", "lora", 1), ("upcycle-qwen3", "continue", 2)]
)
def test_a_recipe_is_rehearsed_on_slurm_to_its_report(
    healthy: Cluster, tmp_path: Path, launch: Launch, recipe: str, stage: str, nodes: int
) -> None:
    submitted = launch("rehearse", f"configs/{recipe}.yaml", "--site", "devcluster", "--set", f"run_root={tmp_path}")
    assert submitted.returncode == 0, submitted.stderr
    run = tmp_path / f"{recipe}-rehearsal"
    assert submitted.stdout.splitlines()[-1] == f"next: python launch.py watch {run}"
    watched = launch("watch", run, timeout=900)
    assert f"report: {run / 'report.html'}" in watched.stdout, watched.stdout + watched.stderr
    assert (run / "report.html").is_file()
    task = json.loads((run / "stages" / stage / "task.json").read_text())
    assert (task["nodes"], task["ranks"]) == (nodes, 2)
    assert len(list((run / "stages" / stage).glob("energy-*.jsonl"))) == nodes
