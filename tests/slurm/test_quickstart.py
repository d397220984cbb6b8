"""The main job as Slurm jobs: the same chain, four ranks on two nodes, the same loss as on this machine."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from hpc.run.directory import RunDirectory, read_jsonl
from slurm.devcluster.cluster import Cluster
from slurm.status import chain_status
from tests.conftest import ROOT, Launch, quickstart_command
from tests.slurm.conftest import Chain, slurm

pytestmark = pytest.mark.slurm

FOUR_RANKS = (
    "stages.pretrain.train.steps=30",
    "stages.pretrain.train.parallel.expert_parallel_size=4",
    "stages.pretrain.train.batches.micro_batch_size=2",
)


def loss(run: Path, stage: str) -> float:
    return float(json.loads((run / "stages" / stage / "receipt.json").read_text())["metrics"]["heldout_loss"])


def local_loss(folder: Path, text: Path, launch: Launch) -> float:
    """Held-out loss of the same pretraining on the same text with four ranks on this machine, through `run`."""
    shutil.copytree(text, folder / "quickstart/stages/text")
    chain = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    chain["stages"] = [stage for stage in chain["stages"] if stage["name"] in ("text", "pretrain")]
    site = yaml.safe_load((ROOT / "configs/sites/local.yaml").read_text())
    site["machine"]["ranks_per_node"] = 4
    (folder / "chain.yaml").write_text(yaml.safe_dump(chain))
    (folder / "four.yaml").write_text(yaml.safe_dump(site))
    shortened = [word for word in quickstart_command(folder) if word.startswith(("run_root", "stages.pretrain."))]
    settings = [*shortened, *FOUR_RANKS, "stages.pretrain.train.parallel.ranks_per_node=4", "tracking.wandb=disabled"]
    words = [word for setting in settings for word in ("--set", setting)]
    result = launch("run", folder / "chain.yaml", "--site", folder / "four.yaml", *words)
    assert result.returncode == 0, result.stderr
    return loss(folder / "quickstart", "pretrain")


def test_the_quickstart_as_slurm_jobs_ends_with_the_loss_of_the_local_run(
    healthy: Cluster, tmp_path: Path, launch: Launch
) -> None:
    command = quickstart_command(tmp_path, *FOUR_RANKS, "stages.pretrain.train.parallel.nodes=2")
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
    assert chain.run.report.exists()
    assert "kill-on-invalid-dep=yes" in slurm("cat", chain.run.jobs / f"{chain.submitted('report')}_submission.sh")
    folder = tmp_path / "local"
    folder.mkdir()
    here = local_loss(folder, chain.run.stage("text").root, launch)
    assert loss(chain.run.root, "pretrain") == pytest.approx(here, abs=1e-3)
