"""Energy budgets: refused or warned of by the plan, kept by a running stage, and never a reason to redo anything."""

from pathlib import Path
from typing import Any

import pytest

from hpc.config import RunConfig
from hpc.energy.budget import Budget
from hpc.errors import BudgetSpent, ConfigError
from hpc.plan.budget import check_budgets
from hpc.plan.plan import plan
from hpc.run.directory import StageDirectory
from hpc.run.task import TaskFile, asked, asked_to_learn
from slurm.restart import judge
from slurm.site import load_site
from tests.energy.life import Life

KWH = 3.6e6
CHAIN: dict[str, Any] = {
    "name": "run",
    "stages": [
        {"name": "a", "kind": "prepare", "sources": [{"module": "pydoc_data.topics:topics"}]},
        {"name": "b", "kind": "prepare", "needs": ["a"], "sources": [{"module": "pydoc_data.topics:topics"}]},
    ],
}


def config(run_kwh: float | None, b_kwh: float | None) -> RunConfig:
    first, second = CHAIN["stages"]
    stages = [first, {**second, "energy_budget_kwh": b_kwh}]
    return RunConfig.model_validate({**CHAIN, "energy_budget_kwh": run_kwh, "stages": stages})


def test_a_plan_above_a_budget_is_refused_with_both_figures_and_a_way_out() -> None:
    estimate = {"a": 1.0 * KWH, "b": 2.0 * KWH}
    with pytest.raises(ConfigError) as caught:
        check_budgets(config(None, 1.5), estimate)
    assert str(caught.value) == (
        "stage 'b' would draw about 2 kWh (estimated), but stages.b.energy_budget_kwh = 1.5: plan fewer steps or a "
        "smaller model, or raise it: --set stages.b.energy_budget_kwh=2.5"
    )
    with pytest.raises(ConfigError, match=r"stage 'b' would draw about .* --set stages\.b\.energy_budget_kwh="):
        plan(config(None, 1e-9), load_site("local").machine)
    with pytest.raises(ConfigError, match=r"the run would draw about 3 kWh .* energy_budget_kwh = 2\.9: .*=3\.8"):
        check_budgets(config(2.9, None), estimate)


def test_a_plan_near_a_budget_or_with_an_unknown_part_warns() -> None:
    estimate = {"a": 1.0 * KWH, "b": 2.0 * KWH}
    assert check_budgets(config(3.8, 2.6), estimate) == ()
    near = check_budgets(config(3.7, None), estimate)
    assert near == ("warning: the run would draw about 3 kWh (estimated), energy_budget_kwh = 3.7 may not suffice",)
    unknown = check_budgets(config(3.7, None), {"a": 1.0 * KWH, "b": None})
    assert len(unknown) == 1
    assert "what b will draw is not known beforehand" in unknown[0]
    with pytest.raises(ConfigError):
        check_budgets(config(0.9, None), {"a": 1.0 * KWH, "b": None})  # what is known is too much already


def test_raising_a_budget_changes_nothing_that_a_receipt_or_a_checkpoint_depends_on() -> None:
    low, high = config(1.0, 1.0).stage("b"), config(2.0, 2.0).stage("b")
    assert low != high
    assert asked(low, 1) == asked(high, 1)
    assert asked_to_learn(low, 1) == asked_to_learn(high, 1)


def task(run: Path, chain: RunConfig) -> TaskFile:
    site = load_site("local")
    return TaskFile(
        run="run", run_directory=str(run), stage=chain.stage("b"), stages=chain.stages, inputs={}, seed=1,
        tracking=chain.tracking, machine=site.machine, facility=site.facility, ranks=1, nodes=1,
        energy_budget_kwh=chain.energy_budget_kwh,
    )  # fmt: skip


def drawn(run: Path, stage: str, watts: int, seconds: float, place: str = "stages") -> Life:
    """A stage that has drawn watts x seconds (and is still being sampled)."""
    life = Life(run / place / stage, {"n1": watts}, kind="prepare")
    life.begin(0.125, 0.0)
    life.end(seconds, None, has_end=False)
    return life


def test_a_stages_budget_covers_its_attempts_and_a_runs_budget_all_stages_and_superseded_ones(tmp_path: Path) -> None:
    drawn(tmp_path, "a", 1000, 3600)  # 1 kWh
    drawn(tmp_path, "a-1", 1000, 1800, "superseded")  # 0.5 kWh
    own = drawn(tmp_path, "b", 2000, 3600)  # 2 kWh
    directory = StageDirectory(own.root)

    def spent(run_kwh: float | None, b_kwh: float | None, attempt: int = 1) -> str | None:
        return Budget(task(tmp_path, config(run_kwh, b_kwh)), directory, attempt).spent()

    assert spent(None, None) is None
    assert spent(None, 2.01) is None
    assert spent(None, 1.99) == "2 kWh are drawn, energy_budget_kwh of the stage is 1.99"
    assert spent(None, 1.99, attempt=2) is not None, "what attempts before this one drew counts too"
    assert spent(3.51, None) is None
    assert spent(3.49, None) == "3.5 kWh are drawn by all stages, energy_budget_kwh of the run is 3.49"
    with pytest.raises(BudgetSpent, match="raise it to go on"):
        Budget(task(tmp_path, config(3.49, None)), directory, 1).check()


def test_a_stage_that_is_about_to_be_set_aside_begins_with_its_whole_budget(tmp_path: Path) -> None:
    directory = StageDirectory(drawn(tmp_path, "b", 2000, 3600).root)
    chain = config(None, 1.0)
    assert Budget(task(tmp_path, chain), directory, 2).spent() is not None
    assert Budget(task(tmp_path, chain), directory, 2, counts_earlier=False).spent() is None


def test_an_attempt_that_ended_at_its_budget_is_never_requeued() -> None:
    def end(rank: int, code: int, message: str) -> dict[str, Any]:
        return {"event": "end", "attempt": 1, "rank": rank, "time": 2.0 + rank, "outcome": "stopped",
                "exit_code": code, "message": message, "is_crash": False, "node": "n1"}  # fmt: skip

    start = {"event": "start", "attempt": 1, "time": 1.0, "ranks": 2, "nodes": ["n1"]}
    told = "2 kWh are drawn; checkpoint at step 40 is safe"
    verdict = judge([start, end(1, 12, "as rank 0 says"), end(0, 12, told)], has_receipt=False, step=40, retries=3)
    assert (verdict.action, verdict.reason, verdict.cause) == ("fail", told, "")
    stopped = judge([start, end(0, 130, "x"), end(1, 130, "x")], has_receipt=False, step=40, retries=3)
    assert stopped.action == "requeue", "an ordinary stop is"
