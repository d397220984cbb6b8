"""A training stage that reaches its energy budget stops with a checkpoint, and goes on when the budget is raised."""

import json
from pathlib import Path

import yaml

from hpc.energy.goodput import stage_goodput
from hpc.energy.ledger import stage_ledger
from hpc.run.directory import RunDirectory, read_jsonl
from slurm.ledger import look, to_json
from tests.conftest import ROOT, Launch


def test_training_stops_at_its_budget_with_a_checkpoint_and_goes_on_when_it_is_raised(
    prepared: Path, launch: Launch
) -> None:
    folder = prepared.parent
    run, pretrain = folder / "small", folder / "small/stages/pretrain"
    site = yaml.safe_load((ROOT / "configs/sites/local.yaml").read_text())
    site["machine"] |= {"peak_flops_per_rank": 1e18, "stage_overhead_s": 0.0}  # the plan takes it for nearly free
    (folder / "fast.yaml").write_text(yaml.safe_dump(site))
    shared = ["run", prepared, "--site", folder / "fast.yaml", "--set", f"run_root={folder}",
              "--set", "tracking.wandb=disabled"]  # fmt: skip

    low = launch(*shared, "--set", "stages.pretrain.energy_budget_kwh=1e-6")  # 3.6 J: less than its start draws
    assert low.returncode == 12, low.stderr
    assert low.stderr.startswith("error: stage 'pretrain': ")
    assert (
        "energy_budget_kwh of the stage is 1e-06; stopped at step 1 of 50, checkpoint at step 1 is safe" in low.stderr
    )
    assert low.stderr.count("\n") == 1
    assert (pretrain / "checkpoints/step-00000001/MANIFEST.json").exists()
    ends = [row for row in read_jsonl(pretrain / "attempts.jsonl") if row["event"] == "end"]
    assert {(row["outcome"], row["exit_code"]) for row in ends} == {("stopped", 12)}

    raised = launch(*shared, "--set", "stages.pretrain.energy_budget_kwh=1", "--set", "energy_budget_kwh=1")
    assert raised.returncode == 0, raised.stderr
    assert "text: reused" in raised.stdout
    assert "pretrain: resume: an earlier attempt did not finish" in raised.stdout
    steps = [row["step"] for row in read_jsonl(pretrain / "metrics.jsonl")]
    assert steps == list(range(51)), "no step was done twice"

    ledger, goodput = stage_ledger(pretrain), stage_goodput(pretrain)
    assert [(work.attempt, work.kind) for work in ledger.lost if (work.energy_j or 0) > 20] == []
    assert ledger.missing == ()
    assert goodput is not None
    assert abs(sum(goodput.seconds.values()) - goodput.wall_s) < 1e-6
    assert {part for part, seconds in goodput.seconds.items() if seconds > 0} >= {
        "start", "compile", "productive", "checkpoint", "idle",
    }  # fmt: skip
    assert json.loads((pretrain / "receipt.json").read_text())["energy"]["lost_j"] == ledger.lost_j
    told = to_json(RunDirectory(run), look(RunDirectory(run)))
    assert told["is_complete"]
    assert told["energy_j"] == told["useful_j"] + told["lost_j"]
    assert [stage["name"] for stage in told["stages"]] == ["text", "pretrain"]
    assert "complete: every node of every attempt reported, to within 5 s of its end" in launch("ledger", run).stdout
