"""The doctor on a real Slurm: its job runs on real nodes, its findings are theirs."""

import json
from pathlib import Path

import pytest

from slurm import commands
from slurm.devcluster.cluster import Cluster
from tests.conftest import Launch

pytestmark = pytest.mark.slurm


def examined(launch: Launch, folder: Path, *more: str) -> tuple[int, dict[str, dict[str, str]], str]:
    words = ("doctor", "--site", "devcluster", "--ranks-per-node", "2", "--run-root", folder, "--json", *more)
    result = launch(*words)
    found = json.loads(result.stdout) if result.stdout else []
    return result.returncode, {finding["topic"]: finding for finding in found}, result.stderr


def test_a_site_that_works_is_measured(healthy: Cluster, launch: Launch, tmp_path: Path) -> None:
    code, found, _ = examined(launch, tmp_path, "--config", "configs/quickstart.yaml")
    assert code == 0, [finding for finding in found.values() if finding["level"] == "problem"]
    levels = {topic: finding["level"] for topic, finding in found.items()}
    wanted = (
        "ranks",
        "versions",
        "network",
        "shared files",
        "clocks",
        "cores",
        "signals",
        "requeue",
        "space",
        "saving",
    )
    assert {topic: levels[topic] for topic in wanted} == dict.fromkeys(wanted, "ok")
    assert "4 ranks on n1, n2" in found["ranks"]["what"]
    assert "gloo all-to-all over eth0" in found["network"]["what"] or healthy.layout.mode == "multi"
    assert "GraceTime 0 s" in found["preemption"]["what"]
    assert levels["sacct"] == "note"


def test_ranks_and_cores_can_be_asked_of_srun_only(healthy: Cluster, launch: Launch, tmp_path: Path) -> None:
    code, found, _ = examined(
        launch, tmp_path, "--site-set", "slurm.tasks_in_step=true", "--site-set", "slurm.exclusive=true"
    )
    assert (code, found["ranks"]["level"]) == (0, "ok")


@pytest.mark.parametrize(
    ("override", "expected", "remedy"),
    [
        ("network_interface=ib7", "network_interface 'ib7' has no IPv4 address on n1", "network_interface"),
        ("python=/nowhere/python", "/nowhere/python", "interpreter"),
        ('setup=["module load nothing-of-that-name"]', "setup failed: module load nothing-of-that-name", "interpreter"),
    ],
)
def test_a_site_that_does_not_is_told_where(
    healthy: Cluster, launch: Launch, tmp_path: Path, override: str, expected: str, remedy: str
) -> None:
    code, found, _ = examined(launch, tmp_path, "--site-set", override)
    assert code == 8
    assert found["ranks"]["level"] == "problem"
    assert expected in found["ranks"]["what"]
    assert remedy in found["ranks"]["do"]


def test_a_job_that_does_not_start_is_cancelled(healthy: Cluster, launch: Launch, tmp_path: Path) -> None:
    for name in healthy.layout.names:
        commands.call("scontrol", "update", f"nodename={name}", "state=drain", "reason=test")
    try:
        code, _, error = examined(launch, tmp_path, "--wait", "0.05")
    finally:
        for name in healthy.layout.names:
            commands.call("scontrol", "update", f"nodename={name}", "state=resume")
    assert code == 8
    assert "did not start in 0.05 min" in error
    assert not [job for job in commands.queue() if job.is_alive]
