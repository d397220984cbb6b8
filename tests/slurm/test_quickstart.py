"""The main job as Slurm jobs: the same chain, four ranks on two nodes, the same losses as on this machine."""

import json
from pathlib import Path

import pytest

from hpc.run.directory import RunDirectory, read_jsonl
from slurm.devcluster.cluster import Cluster
from slurm.status import chain_status
from tests.conftest import Launch, quickstart_command
from tests.slurm.conftest import Chain, slurm

pytestmark = pytest.mark.slurm


def loss(run: Path, stage: str) -> float:
    return float(json.loads((run / "stages" / stage / "receipt.json").read_text())["metrics"]["heldout_loss"])


def test_the_quickstart_as_slurm_jobs_ends_with_the_losses_of_the_local_run(
    healthy: Cluster, quickstart: Path, tmp_path: Path, launch: Launch
) -> None:
    parallel = "stages.pretrain.train.parallel"
    command = quickstart_command(
        tmp_path, f"{parallel}.nodes=2", f"{parallel}.expert_parallel_size=4",
        "stages.pretrain.train.batches.micro_batch_size=2",
    )  # fmt: skip
    result = launch("submit", *command, "--site", "devcluster")
    assert result.returncode == 0, result.stderr
    chain = Chain(RunDirectory(tmp_path / "quickstart"))
    chain.wait(lambda: chain_status(chain.run).is_over, "end of the chain", 600)
    status = chain_status(chain.run)
    assert status.is_done, chain.story()

    start = next(row for row in chain.attempts("pretrain") if row["event"] == "start")
    assert (start["ranks"], len(start["nodes"])) == (4, 2)
    arrays = {row["stages"][0]: row for row in read_jsonl(chain.run.submissions) if len(row.get("jobs", [])) == 2}
    assert set(arrays) == {"lora-modern", "merge-modern"}
    assert "aftercorr:" + arrays["lora-modern"]["jobs"][0].split("_")[0] in arrays["merge-modern"]["dependency"]
    for stage in ("pretrain", "lora-modern", "lora-python"):
        assert loss(chain.run.root, stage) == pytest.approx(loss(quickstart, stage), abs=1e-3)
    assert chain.run.report.exists()
    assert "kill-on-invalid-dep=yes" in slurm("cat", chain.run.jobs / f"{chain.submitted('report')}_submission.sh")
