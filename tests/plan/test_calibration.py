"""What an earlier run or a few real steps tell a plan: speed, router loads, memory; and what failures cost."""

import json
import shutil
from math import sqrt
from pathlib import Path

import pytest

from hpc.config import Machine, Router, RunConfig
from hpc.config.load import load_config
from hpc.errors import ArtifactError
from hpc.plan.calibration import from_run, from_steps, rate_of, to_measure
from hpc.plan.failures import best_interval, failures, goodput
from hpc.plan.imbalance import Histogram, from_passport, imbalance, rank_loads
from hpc.plan.plan import Plan, StagePlan, plan
from slurm.site import load_site
from tests.conftest import Launch


@pytest.fixture
def quick(root: Path) -> RunConfig:
    return load_config(root / "configs/quickstart.yaml")


@pytest.fixture
def machine() -> Machine:
    return load_site("local").machine


def stage_of(made: Plan, name: str = "pretrain") -> StagePlan:
    return next(stage for stage in made.stages if stage.name == name)


@pytest.fixture
def run(tmp_path: Path, root: Path) -> Path:
    """A run directory with what a plan reads of it: pretraining at 4,096 tokens/s, 400 steps in 230 s."""
    folder = tmp_path / "run"
    stage = folder / "stages/pretrain"
    stage.mkdir(parents=True)
    shutil.copy(root / "configs/quickstart.yaml", folder / "config.yaml")
    receipt = {"seconds": 230.0, "attempts": 1, "metrics": {"tokens_per_s": 4096.0, "peak_memory_bytes": 2**30}}
    (stage / "receipt.json").write_text(json.dumps(receipt))
    even, uneven = [0.125] * 8, [0.2, 0.2, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05]
    rows = [{"step": step, "router_load": [uneven if step == 7 else even] * 4} for step in range(1, 51)]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "stages/quantize").mkdir()
    (folder / "stages/quantize/receipt.json").write_text(json.dumps({"seconds": 33.0, "attempts": 1, "metrics": {}}))
    return folder


def test_a_measured_speed_is_planned_again_in_the_same_layout(quick: RunConfig, machine: Machine, run: Path) -> None:
    made = plan(quick, machine, None, from_run(run, machine))
    stage = stage_of(made)
    assert stage.step is not None
    assert stage.step.seconds == pytest.approx(2048 / 4096)
    assert made.assumptions[0].startswith("time: measured: 4,096 tokens/s of stage pretrain in ")
    assert stage.time.value == pytest.approx(230.0, rel=1e-3), "steps, held-out text, and what was left for the start"
    assert any("1.00 GiB on the fullest rank (measured" in note for note in stage.notes)
    assert stage_of(made, "quantize").time.value == 33.0


def test_the_rate_carries_over_to_adapters_and_to_other_layouts(quick: RunConfig, machine: Machine, run: Path) -> None:
    known = from_run(run, machine)
    lora, without = (stage_of(plan(quick, machine, None, m), "lora-modern") for m in (known, None))
    assert lora.step is not None
    assert without.step is not None
    profile = machine.peak_flops_per_rank * machine.expected_mfu
    assert lora.step.parts["compute"] == pytest.approx(
        without.step.parts["compute"] * profile / known.rates["pretrain"].flops_per_s
    )


def test_router_loads_of_a_run_replace_the_stated_model(quick: RunConfig, machine: Machine, run: Path) -> None:
    stated, known = stage_of(plan(quick, machine)), stage_of(plan(quick, machine, None, from_run(run, machine)))
    assert stated.memory is not None
    assert known.memory is not None
    assert stated.memory.load.how.startswith("estimated:")
    assert known.memory.load.how.startswith("measured: router loads of 50 steps")
    assert known.memory.load.p99 == pytest.approx(1.6), "the one uneven step of 50: four experts have 0.8 of the tokens"
    assert known.memory.load.worst == 2.0


def test_a_run_in_which_nothing_was_measured_is_refused(tmp_path: Path, machine: Machine, root: Path) -> None:
    with pytest.raises(ArtifactError, match="is no run directory"):
        from_run(tmp_path, machine)
    shutil.copy(root / "configs/quickstart.yaml", tmp_path / "config.yaml")
    with pytest.raises(ArtifactError, match="nothing was measured"):
        from_run(tmp_path, machine)


def test_steps_that_were_just_done_are_planned_with(quick: RunConfig, machine: Machine) -> None:
    kinds = to_measure(quick)
    assert [stage.name for stage, _ in kinds.values()] == ["pretrain", "lora-modern"]
    speeds = {kind: (facts, stage.train, 1024.0) for kind, (stage, facts) in kinds.items()}
    made = plan(quick, machine, None, from_steps(speeds, machine))
    for name in ("pretrain", "lora-modern"):
        step = stage_of(made, name).step
        assert step is not None
        assert step.seconds == pytest.approx(2.0)


def test_a_rate_leaves_out_what_memory_and_exchange_take(quick: RunConfig, machine: Machine) -> None:
    stage, facts = to_measure(quick)["pretrain"]
    alone = rate_of(facts, stage.train, machine, 4096.0, "here").flops_per_s
    flops = 2048 * 25_214_976 / 2
    assert alone > flops / (2048 / 4096)
    linked = machine.model_copy(update={"link_bytes_per_s": 1e9})
    assert rate_of(facts, stage.train, linked, 4096.0, "here").flops_per_s > alone


def test_a_passport_is_read_from_wherever_it_lies(tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    counts = [[30, 10, 10, 10], [10, 10, 10, 30]]
    written = {"first_step": 1, "last_step": 9, "assignments": counts}
    (artifact / "router_passport.json").write_text(json.dumps(written))
    for place in (tmp_path, artifact, artifact / "router_passport.json"):
        found = from_passport(place)
        assert "steps 1 to 9" in found.source
        assert found.p99(2) == pytest.approx(1.0), "one layer's fuller rank is the other's emptier one"
    assert rank_loads([counts[0]], 2) == pytest.approx([4 / 3, 2 / 3])
    with pytest.raises(ArtifactError, match="name the folder of a training stage"):
        from_passport(tmp_path / "absent")
    (artifact / "router_passport.json").write_text("null")
    with pytest.raises(ArtifactError, match="is no router passport"):
        from_passport(tmp_path)


def test_loads_that_are_stated_or_measured_stay_below_the_worst() -> None:
    router = Router(num_experts=8, top_k=2)
    assert imbalance(router, 1).p99 == 1.0
    two = imbalance(router, 2)
    assert (two.mean, two.worst) == (1.0, 2.0)
    assert two.p99 == pytest.approx(1 + 2.33 * 0.5 * sqrt(0.5 / 4))
    assert imbalance(router, 8).worst == 4.0, "a token takes one of its two experts here at most"
    all_here = Histogram(([[1.0, 0, 0, 0, 0, 0, 0, 0]],), "a test")
    assert imbalance(router, 8, all_here).p99 == 4.0
    assert imbalance(replace_experts(router, 16), 2, all_here).how.startswith("estimated:"), "of another model"


def replace_experts(router: Router, number: int) -> Router:
    return router.model_copy(update={"num_experts": number})


def test_the_best_interval_is_dalys_and_for_short_stalls_youngs() -> None:
    assert best_interval(1e-3, 1e6) == pytest.approx(sqrt(2 * 1e-3 * 1e6), rel=1e-3)
    assert best_interval(60, 86400) == pytest.approx(
        sqrt(2 * 60 * 86400) * (1 + sqrt(60 / 172800) / 3 + 60 / 1555200) - 60
    )
    assert best_interval(100, 40) == 40
    best = best_interval(60, 86400)
    assert goodput(best, 60, 0, 86400) > max(goodput(best * f, 60, 0, 86400) for f in (0.5, 0.8, 1.25, 2))


def test_failures_grow_with_nodes_and_time() -> None:
    found = failures(10 * 3600, nodes=100, node_mtbf_hours=5000, interval_s=1800, stall_s=18, restart_s=300)
    assert found.expected == pytest.approx(0.2)
    assert found.goodput == pytest.approx(1 - 18 / 1818 - (900 + 300) / (50 * 3600))
    assert found.best_goodput >= found.goodput


def test_a_site_that_states_more_gets_more(quick: RunConfig, machine: Machine, launch: Launch) -> None:
    bare = stage_of(plan(quick, machine))
    assert bare.failures is None
    assert bare.checkpoint.value == 12 * 9_448_192
    assert bare.checkpoint_time.value is None
    assert "storage_bytes_per_s" in bare.checkpoint_time.how
    stated = machine.model_copy(update={"node_mtbf_hours": 1000.0, "storage_bytes_per_s": 1e8})
    found = stage_of(plan(quick, stated))
    assert found.failures is not None
    assert found.checkpoint_time.value == pytest.approx(1.13, rel=0.01)
    watts = machine.model_copy(update={"power": machine.power.model_copy(update={"node_busy_w": 100.0})})
    energy, time = stage_of(plan(quick, watts)).energy.value, stage_of(plan(quick, watts)).time.value
    assert time is not None
    assert energy == pytest.approx(100 * time)
    text = launch("plan", "configs/quickstart.yaml", "--site-set", "machine.node_mtbf_hours=1000").stdout
    assert "pretrain: " in text
    assert "failures of nodes expected, goodput" in text


def test_the_verb_plans_with_an_earlier_run(run: Path, launch: Launch) -> None:
    text = launch("plan", "configs/quickstart.yaml", "--measured", run).stdout
    assert "time: measured: 4,096 tokens/s" in text
    detail = launch("plan", "configs/quickstart.yaml", "--measured", run, "--detail", "pretrain").stdout
    assert "p99 x 1.60" in detail
    refused = launch("plan", "configs/quickstart.yaml", "--measured", run / "stages")
    assert (refused.returncode, refused.stderr.count("\n")) == (4, 1) or "is no run directory" in refused.stderr
