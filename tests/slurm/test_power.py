"""Four nodes that draw 100, 200, 300 and 400 W: the ledger's joules are those that were fed, whatever happens."""

import json
import shutil
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.energy.goodput import stage_goodput
from hpc.energy.ledger import StageLedger, run_ledger, stage_ledger
from hpc.run.directory import RunDirectory, read_jsonl
from slurm.devcluster.cluster import Cluster
from slurm.devcluster.files import Layout
from slurm.ledger import look
from tests.conftest import ROOT, Launch
from tests.slurm.conftest import DATABASE, PROGRAMS, SMALL, Chain, make_cluster, slurm, submit

pytestmark = pytest.mark.slurm
WATTS = (100.0, 200.0, 300.0, 400.0)
MEASURED = "measured: HPE Cray pm_counters"


def metered(*, accounting: bool) -> Iterator[Cluster]:
    """Four nodes with a meter each, and nothing else in the way."""
    cluster = make_cluster(lambda root, mode: Layout(root, mode, power_w=WATTS, accounting=accounting))
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in cluster.environment().items():
                patch.setenv(name, value)
            yield cluster
    finally:
        cluster.down()


@pytest.fixture
def quick_cluster() -> Iterator[Cluster]:
    yield from metered(accounting=False)


@pytest.fixture
def full_cluster() -> Iterator[Cluster]:
    yield from metered(accounting=all(shutil.which(name, path="/usr/sbin:/usr/bin") for name in (*PROGRAMS, *DATABASE)))


def fed_joules(cluster: Cluster, ledger: StageLedger) -> float:
    """What the meters were fed in the windows that the ledger's nodes were sampled in."""
    rows = read_jsonl(cluster.layout.path / "power" / "fed.jsonl")
    times = [row["time"] for row in rows]

    def at(node: str, time: float) -> float:
        after = min(max(bisect_right(times, time), 1), len(rows) - 1)
        before, then = rows[after - 1], rows[after]
        part = (time - before["time"]) / (then["time"] - before["time"])
        return float(before["joules"][node] + part * (then["joules"][node] - before["joules"][node]))

    return sum(at(node.host, node.end) - at(node.host, node.start) for node in ledger.nodes)


def check(cluster: Cluster, root: Path, attempts: int) -> StageLedger:
    """The ledger of a stage that ran on all four nodes in every attempt: within 1 % of what was fed."""
    ledger, goodput = stage_ledger(root), stage_goodput(root)
    print(f"ledger {ledger.energy_j:.1f} J, fed {fed_joules(cluster, ledger):.1f} J, missing {ledger.missing}")
    assert {(node.attempt, node.host) for node in ledger.nodes} == {
        (attempt, f"n{number}") for attempt in range(1, attempts + 1) for number in (1, 2, 3, 4)
    }
    assert all(source.startswith(MEASURED) for source in ledger.provenance)
    assert ledger.energy_j == pytest.approx(fed_joules(cluster, ledger), rel=0.01)
    assert ledger.useful_j is not None
    assert ledger.lost_j is not None
    assert ledger.useful_j + ledger.lost_j == ledger.energy_j
    assert {work.attempt for work in ledger.lost} == set(range(1, attempts)), "all attempts but the last lost something"
    assert goodput is not None
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_s, abs=1e-6)
    assert sum(joules or 0 for joules in goodput.energy_j.values()) == ledger.energy_j
    return ledger


def test_joules_of_a_requeued_stage_that_lost_a_node_are_those_that_were_fed(
    quick_cluster: Cluster, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    stage = run.stage("made-up")
    stage.root.mkdir(parents=True)
    command = f"srun --kill-on-bad-exit=1 {sys.executable} {ROOT}/tests/slurm/stand_in.py {stage.root} 12"
    job = slurm("sbatch", "--parsable", "-N4", "--ntasks-per-node=1", "--requeue", f"--export=ALL,PYTHONPATH={ROOT}",
                "-o", tmp_path / "log", "--open-mode=append", "--wrap", command).strip()  # fmt: skip
    chain = Chain(run)

    def sampled(attempt: int, seconds: float) -> bool:
        found = [node for node in stage_ledger(stage.root).nodes if node.attempt == attempt]
        return len(found) == 4 and min(node.end - node.start for node in found) > seconds

    chain.wait(lambda: sampled(1, 8), "eight seconds of the first attempt", 60)
    slurm("scontrol", "requeue", job)
    chain.wait(lambda: sampled(2, 8), "eight seconds of the second attempt", 60)
    quick_cluster.kill_node("n4")
    quick_cluster.mark_down("n4")
    quick_cluster.start_node("n4")
    quick_cluster.wait_nodes()
    chain.wait(lambda: sampled(3, 11), "eleven seconds of the third attempt", 60)
    chain.wait_until_idle(30)
    receipt = {"stage": "made-up", "kind": "", "config": {}, "inputs": {}, "files": [], "metrics": {},
               "provenance": {}, "energy": {}, "code": {}, "seconds": 1.0, "attempts": 3}  # fmt: skip
    stage.receipt.write_text(json.dumps(receipt))

    ledger = check(quick_cluster, stage.root, attempts=3)
    last = [node for node in ledger.nodes if node.attempt == 3]
    assert all(node.complete for node in last)
    assert ledger.useful_j == sum(node.energy_j or 0 for node in last)
    assert [node.host for node in ledger.nodes if node.attempt == 2 and not node.complete] == ["n4"]
    assert all("n4" in words for words in ledger.missing), "only the dead node may lack a few seconds"

    (stage.root / "energy-n2.jsonl").unlink()
    lacking = run_ledger(run.root)
    assert not lacking.is_complete
    assert [words for words in lacking.missing if "n2" in words] == [
        f"made-up: attempt {attempt}: node n2 reported nothing" for attempt in (1, 2, 3)
    ]
    assert lacking.energy_j == ledger.energy_j - sum(n.energy_j or 0 for n in ledger.nodes if n.host == "n2")


@pytest.mark.slow
def test_a_real_training_stage_on_four_nodes_with_a_requeue_a_lost_node_and_sacct(
    full_cluster: Cluster, tmp_path: Path, launch: Launch
) -> None:
    four = SMALL.replace("nodes: 2, ranks_per_node: 2", "nodes: 4, ranks_per_node: 1")
    chain = submit(tmp_path, four.format(steps=300, resources="{}"))
    job = chain.submitted("pretrain")
    chain.wait(lambda: chain.step(attempt=1) >= 50, "step 50", 300)
    slurm("scontrol", "requeue", job)
    chain.wait(lambda: chain.step(attempt=2) >= 130, "step 130 of the second attempt", 300)
    full_cluster.kill_node("n4")
    full_cluster.mark_down("n4")
    full_cluster.start_node("n4")
    full_cluster.wait_nodes()
    chain.wait_for_receipt(timeout_s=300)
    chain.wait_until_idle()

    root = chain.run.stage("pretrain").root
    ledger = check(full_cluster, root, attempts=3)
    assert ledger.tokens == 300 * 1024
    kinds = {(work.attempt, work.kind) for work in ledger.lost}
    assert {(1, "failed_attempt"), (2, "replayed_steps")} <= kinds, "a requeue saves first, a dying node does not"
    assert all("n4" in words for words in ledger.missing)
    goodput = stage_goodput(root)
    assert goodput is not None
    for part in ("queue", "start", "compile", "productive", "replay"):
        assert goodput.seconds[part] > 0, part
    print(json.dumps(goodput.seconds))
    print(launch("ledger", chain.run.root).stdout)
    told = json.loads(launch("ledger", chain.run.root, "--json").stdout)
    assert told["energy_j"] == pytest.approx(run_ledger(chain.run.root).energy_j)
    if full_cluster.layout.accounting:
        theirs = look(chain.run).reconciled[0]
        print(theirs)
        assert theirs.theirs_j == pytest.approx(theirs.ours_j, rel=0.3), "Slurm counts other seconds, not other watts"
        assert "2 attempts without a figure" in theirs.note


@pytest.mark.slow
def test_a_stage_on_slurm_stops_at_its_budget_is_not_requeued_and_retry_goes_on_when_it_is_raised(
    quick_cluster: Cluster, tmp_path: Path, launch: Launch
) -> None:
    cheap = ("--site-set", "machine.peak_flops_per_rank=1e18", "--site-set", "machine.stage_overhead_s=0")
    budget = "stages.pretrain.energy_budget_kwh"
    chain = submit(tmp_path, SMALL.format(steps=60, resources="{}"), *cheap, "--set", f"{budget}=1e-4")
    chain.wait(lambda: any(row["event"] == "verdict" for row in chain.attempts("pretrain")), "verdict", 300)
    chain.wait_until_idle()
    verdict = next(row for row in chain.attempts("pretrain") if row["event"] == "verdict")
    assert verdict["action"] == "fail"
    assert "energy_budget_kwh of the stage is 0.0001; stopped at step 1 of 60" in verdict["reason"]
    assert chain.starts() == 1
    shown = launch("status", chain.run.root)
    assert shown.returncode == 0, "nothing failed"
    assert "budget spent" in shown.stdout
    assert "retry" in shown.stdout

    refused = launch("retry", chain.run.root, "pretrain")
    assert refused.returncode == 0
    chain.wait(lambda: chain.attempts("pretrain")[-1]["event"] == "verdict" and chain.starts() == 2, "verdict", 120)
    assert "the stage was not begun" in chain.attempts("pretrain")[-1]["reason"]
    chain.wait_until_idle()

    assert launch("retry", chain.run.root, "pretrain", "--set", f"{budget}=1").returncode == 0
    chain.wait_for_receipt(timeout_s=300)
    steps = [row["step"] for row in read_jsonl(chain.run.stage("pretrain").metrics)]
    assert steps == list(range(61)), "it went on from its checkpoint"
    chain.wait_until_idle()
    assert launch("status", chain.run.root).returncode == 0
