"""Everything that happens to a job on a cluster: the chain ends complete, its loss curve bit-equal to a quiet run's."""

import signal
import time
from pathlib import Path

import pytest

from slurm.devcluster.cluster import Cluster
from tests.slurm.conftest import SMALL, Chain, rank_process, slurm, submit

pytestmark = pytest.mark.slurm
STEPS = 360


@pytest.fixture(scope="module")
def quiet(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The same chain with the same layout, left alone."""
    chain = submit(tmp_path_factory.mktemp("quiet"), SMALL.format(steps=STEPS, resources="{}"))
    chain.wait_for_receipt()
    assert chain.starts() == 1
    return chain


def test_requeues_signals_lost_ranks_preemption_and_dying_nodes(healthy: Cluster, quiet: Chain, tmp_path: Path) -> None:
    chain = submit(tmp_path, SMALL.format(steps=STEPS, resources="{partition: low}"))
    job = chain.submitted("pretrain")

    def reached(attempt: int) -> None:
        """The attempt has trained past the checkpoint it began with."""
        chain.wait(lambda: chain.starts() >= attempt, f"attempt {attempt}", 90)
        begun = next(row["checkpoint"] for row in chain.attempts("pretrain") if row.get("attempt") == attempt)
        chain.wait(lambda: chain.step(attempt=attempt) >= begun + 55, f"step {begun + 55} of attempt {attempt}", 90)

    def nodes() -> list[str]:
        starts = [row for row in chain.attempts("pretrain") if row["event"] == "start"]
        return list(starts[-1]["nodes"])

    reached(1)
    slurm("scontrol", "requeue", job)

    reached(2)
    slurm("scancel", "--signal=USR2", job)

    reached(3)
    rank_process(3, job).send_signal(signal.SIGKILL)

    reached(4)
    high = slurm("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
    chain.wait(lambda: chain.starts() >= 5, "attempt after preemption (GraceTime 0)")
    assert high.strip()

    reached(5)
    dead = nodes()[-1]
    healthy.kill_node(dead)
    healthy.mark_down(dead)
    chain.wait(lambda: chain.starts() >= 6, "attempt after a power failure")
    healthy.start_node(dead)

    reached(6)
    orphan = nodes()[0]
    old = rank_process(0, job)
    healthy.kill_slurmd(orphan)
    assert old.is_running(), "its ranks go on without the daemon"
    healthy.mark_down(orphan)
    chain.wait(lambda: chain.starts() >= 7, "attempt after the death of slurmd")

    receipt = chain.wait_for_receipt()
    assert chain.curve() == quiet.curve()
    assert receipt["attempts"] == chain.starts() == 7
    deadline = time.monotonic() + 30
    while old.is_running() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not old.is_running(), "the old attempt must notice that it was superseded"
    reasons = [row["reason"] for row in chain.attempts("pretrain") if row["event"] == "verdict"]
    assert any("rank 3 of 4 was lost without a word" in reason for reason in reasons), reasons
    assert {row["node"] for row in chain.attempts("pretrain") if row["event"] == "node"} >= {dead}
    weights = [
        next(file["sha256"] for file in one["files"] if file["path"] == "model.safetensors")
        for one in (receipt, quiet.wait_for_receipt())
    ]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_time_limit_shorter_than_the_work_and_preemption_with_grace(
    healthy: Cluster, quiet: Chain, tmp_path: Path
) -> None:
    text = SMALL.format(steps=STEPS, resources="{partition: lowgrace, time_limit_min: 1}")
    chain = submit(tmp_path, text, "--site-set", "slurm.signal_before_end_s=36")
    chain.wait(lambda: chain.step() >= 60, "step 60")
    slurm("sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    chain.wait_for_receipt(timeout_s=420)
    assert chain.curve() == quiet.curve()
    ends = [row for row in chain.attempts("pretrain") if row["event"] == "end"]
    stopped = {row["attempt"] for row in ends if row["outcome"] == "stopped"}
    assert len(stopped) >= 3, "one preemption and at least two time limits"
    assert {row["outcome"] for row in ends} == {"stopped", "done"}
    assert len(chain.curve()) == STEPS + 1
