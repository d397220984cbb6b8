"""A task of an array that goes back into the queue does so alone."""

import sys
import time
from pathlib import Path

import pytest

from slurm.devcluster.cluster import Cluster
from tests.conftest import ROOT
from tests.slurm.conftest import slurm

pytestmark = pytest.mark.slurm

SCRIPT = """#!/bin/bash
echo "${{SLURM_RESTART_COUNT:-0}}" >> {folder}/task-$SLURM_ARRAY_TASK_ID
[ "$SLURM_ARRAY_TASK_ID${{SLURM_RESTART_COUNT:-0}}" = 10 ] || {{ sleep 6; exit 0; }}
sleep 2
cd {root} && {python} -c 'from slurm import commands; print(commands.requeue(commands.this_job()))'
sleep 30
"""


def test_the_last_task_of_an_array_is_requeued_without_its_sister(healthy: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "array.sh"
    script.write_text(SCRIPT.format(folder=tmp_path, root=ROOT, python=sys.executable))
    job = slurm("sbatch", "--parsable", "--array=0-1", "-p", "main", "-o", "/dev/null", script).strip()
    deadline = time.monotonic() + 90
    while slurm("squeue", "--noheader", f"--jobs={job}").strip() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (tmp_path / "task-1").read_text().split() == ["0", "1"]
    assert (tmp_path / "task-0").read_text().split() == ["0"]
