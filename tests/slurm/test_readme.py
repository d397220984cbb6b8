"""What the README tells someone who has only a login, word for word, on a cluster that no site file describes."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.run.directory import RunDirectory
from slurm.devcluster.cluster import Cluster
from tests.conftest import ROOT, Launch
from tests.slurm.conftest import Chain

pytestmark = pytest.mark.slurm


def test_your_first_slurm_job(healthy: Cluster, launch: Launch, tmp_path: Path) -> None:
    for name in ("hpc", "slurm", "configs", "launch.py"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    block = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    began = time.monotonic()
    for line in block[1].splitlines():
        command = line.split("  #")[0].replace("python ", f"{sys.executable} ", 1)
        result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    chain = Chain(RunDirectory(tmp_path / "runs/quickstart"))
    chain.wait_for_receipt("text", 120)
    assert time.monotonic() - began < 180, "minutes from a copied site file to a running job"
    assert launch("cancel", chain.run.root).returncode == 0
