"""The entries about beginning with a model that exists: how they compare, what they count, and how they judge."""

from pathlib import Path
from typing import Any

import pytest

from hpc.bench.claims import reuse_against_scratch, upcycling_against_dense
from hpc.bench.claims.claim import Bench
from hpc.bench.claims.curves import Point, Spent
from hpc.bench.claims.reuse_against_scratch import Pair, base_amounts, pays_back_after
from hpc.bench.claims.savings import UNITS, Amounts, Saving, compared
from hpc.bench.claims.trained import CONFIGS, Trained
from hpc.bench.claims.upcycling_against_dense import Contest, Continued
from hpc.config import Finetune, Pretrain
from hpc.config.load import load_config
from hpc.plan.plan import plan
from hpc.run.directory import RunDirectory
from hpc.run.receipt import Receipt, write_receipt
from slurm.site import load_site

BASE: Amounts = {"energy": 900.0, "time": 90.0, "FLOPs": 9e9, "tokens": 4500.0}


def model(*points: tuple[float, float]) -> Trained:
    """A curve of (loss, tokens): 2e6 FLOPs, 0.02 s and 0.2 J a token."""
    curve = [Point(loss, Spent(tokens, tokens / 50, tokens / 5)) for loss, tokens in points]
    return Trained(curve, {"flops": 2e9, "tokens": 1e3}, "estimated: a model")


def test_a_base_counts_before_the_first_step_of_what_begins_with_it() -> None:
    adapted, scratch = model((6, 0), (4, 1000)), model((8, 0), (5, 3000))
    free, full = (compared(1, adapted, "scratch", scratch, before) for before in (None, BASE))
    assert free.loss == full.loss == 5
    assert free.parts == pytest.approx(dict.fromkeys(UNITS, 1 - 500 / 3000))
    assert full.spent["tokens"] == (5000, 3000)
    assert full.spent["energy"] == (1000, 600)
    assert full.parts["FLOPs"] == pytest.approx(1 - 10e9 / 6e9)


def test_joules_of_a_base_that_are_not_known_leave_the_sum_unknown() -> None:
    adapted, scratch = model((6, 0), (4, 1000)), model((8, 0), (5, 3000))
    full = compared(1, adapted, "scratch", scratch, {**BASE, "energy": None})
    assert full.parts["energy"] is None
    assert full.spent["energy"] == (None, 600)


def test_a_base_is_paid_back_by_what_each_adaptation_saves() -> None:
    free = compared(1, model((6, 0), (4, 1000)), "scratch", model((8, 0), (5, 3000)))
    assert pays_back_after(20e9, free) == pytest.approx(20e9 / (6e9 - 1e9))
    assert pays_back_after(20e9, compared(1, model((8, 0), (5, 3000)), "s", model((6, 0), (4, 1000)))) is None


def test_what_only_the_adapted_model_stands_on_is_its_base_and_not_the_text(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")

    def stage(name: str, needs: list[str], metrics: dict[str, float], joules: float) -> None:
        directory = run.stage(name)
        directory.root.mkdir(parents=True)
        files = [{"path": "x", "bytes": 1, "sha256": name}]
        write_receipt(
            directory,
            Receipt(
                name, "any", {}, dict.fromkeys(needs, ""), files, metrics, {}, {}, {}, seconds=joules / 10, attempts=1
            ),
        )
        start = '{"event": "start", "attempt": 1, "time": 0, "counters": []}\n'
        sample = f'{{"event": "sample", "attempt": 1, "time": 1, "energy_j": {{}}, "total_energy_j": {joules}}}\n'
        (directory.root / "energy-host.jsonl").write_text(start + sample)

    stage("text", [], {"tokens": 7}, 50)
    stage("text-task", ["text"], {"tokens": 8}, 60)
    stage("base", ["text"], {"tokens": 1000, "flops": 2e9}, 700)
    stage("adapted", ["base", "text-task"], {"tokens": 100, "flops": 2e8}, 80)
    stage("scratch", ["text-task"], {"tokens": 1000, "flops": 2e9}, 690)
    assert base_amounts(run, "adapted", "scratch") == {"energy": 700, "time": 70, "FLOPs": 2e9, "tokens": 1000}


def pair(free: float | None, full: float | None, steady: float = 0.5, uses: float | None = 1.5) -> Pair:
    """Fractions of energy and time saved without and with the base; `steady`: of FLOPs and tokens without it."""

    def saving(moving: float | None, rest: float) -> Saving:
        parts = {"energy": moving, "time": moving, "FLOPs": rest, "tokens": rest}
        return Saving(1, "scratch", 5.0, parts, dict.fromkeys(parts, (1.0, 2.0)), "estimated: a model")

    return Pair("modern", saving(free, steady), saving(full, -0.2 if (full or 0) < 0 else 0.2), uses)


def test_reuse_holds_where_it_saves_even_with_all_of_its_base() -> None:
    assert reuse_against_scratch.judged([pair(0.6, 0.1)], quick=False, is_shared=False)[0] == "holds"


def test_reuse_holds_if_the_base_is_there_or_is_used_often_enough() -> None:
    verdict, because = reuse_against_scratch.judged(
        [pair(0.6, -0.3, uses=1.5), pair(0.7, 0.1, uses=2.25)], quick=False, is_shared=False
    )
    assert verdict == "holds if"
    assert because.startswith("the base is there already, or is adapted 2.2 times or more")
    assert "energy -65% (seeds: -60%, -70%)" in because


def test_reuse_does_not_hold_where_one_task_took_more() -> None:
    pairs = [pair(0.6, 0.1), pair(0.6, -0.9, steady=-0.1, uses=None)]
    assert reuse_against_scratch.judged(pairs, quick=False, is_shared=False)[0] == "does not hold here"


def test_a_busy_machine_is_judged_by_tokens_and_flops_alone() -> None:
    slow = [pair(-3.0, -9.0)]
    assert reuse_against_scratch.judged(slow, quick=False, is_shared=False)[0] == "does not hold here"
    verdict, because = reuse_against_scratch.judged(slow, quick=False, is_shared=True)
    assert verdict == "holds if"
    assert "FLOPs -50%" in because
    assert "energy" not in because
    assert "not judged" in because


def test_a_quick_run_and_missing_joules_tell_nothing_about_reuse() -> None:
    assert reuse_against_scratch.judged([pair(0.6, 0.1)], quick=True, is_shared=False)[0] == "cannot be told"
    assert reuse_against_scratch.judged([pair(None, None)], quick=False, is_shared=False)[0] == "cannot be told"


# Upcycling ------------------------------------------------------------------------------------------------------------


def contest(seed: int = 1, flops: float = 1e12, **losses: float) -> Contest:
    """Losses of the models by name; all but `dense` had `flops`, it had 1e12."""
    return Contest(
        seed,
        {name: Continued(5.0, loss, 1e12 if name == "dense" else flops, 1000, 9.0) for name, loss in losses.items()},
    )


def test_upcycling_holds_if_the_first_way_ends_below_the_dense_model_in_every_seed() -> None:
    won, lost = contest(dense=4.5, sparse=4.4, copies=4.6), contest(2, dense=4.5, sparse=4.52, copies=4.6)
    verdict, because = upcycling_against_dense.judged([won, won], quick=False)
    assert verdict == "holds"
    assert "sparse (8 experts of half the width, 2 a token) -0.100 nats" in because
    assert upcycling_against_dense.judged([won, lost], quick=False)[0] == "does not hold here"


def test_upcycling_by_another_way_than_the_first_is_a_condition() -> None:
    verdict, because = upcycling_against_dense.judged([contest(dense=4.5, sparse=4.6, copies=4.45)], quick=False)
    assert verdict == "holds if"
    assert because.startswith("it is made of 8 copies of the whole block")


@pytest.mark.parametrize(("quick", "flops"), [(True, 1e12), (False, 1.02e12)])
def test_no_verdict_about_upcycling_from_a_quick_run_or_unequal_budgets(quick: bool, flops: float) -> None:
    verdict, _ = upcycling_against_dense.judged([contest(flops=flops, dense=4.5, sparse=4.0)], quick)
    assert verdict == "cannot be told"


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["claims-upcycle-ways", "upcycle-smollm2"])
def test_what_is_upcycled_trains_for_as_many_flops_as_the_dense_model(recipe: str) -> None:
    config = load_config(CONFIGS / f"{recipe}.yaml")
    tuned = [stage for stage in config.stages if isinstance(stage, Finetune)]
    flops = [found.flops.value for found in plan(config, load_site("local").machine).stages if found.kind == "finetune"]
    assert len(tuned) == len(flops) >= 2
    if recipe == "claims-upcycle-ways":  # the other one's model is not here
        known = [value for value in flops if value is not None]
        assert max(known) / min(known) - 1 < upcycling_against_dense.EQUAL
        assert len(known) == len(tuned)
    assert len({(stage.train.optimizer, stage.train.schedule, stage.train.batches) for stage in tuned}) == 1


def test_reuse_and_scratch_differ_in_where_they_begin_and_in_their_rate() -> None:
    config = load_config(CONFIGS / "claims-reuse.yaml")
    stages = {stage.name: stage for stage in config.stages}
    planned = {stage.name: stage for stage in plan(config, load_site("local").machine).stages}
    for task in reuse_against_scratch.TASKS:
        adapted, scratch, base = (stages[name] for name in (f"adapted-{task}", f"scratch-{task}", "base"))
        assert isinstance(adapted, Finetune)
        assert isinstance(scratch, Pretrain)
        assert isinstance(base, Pretrain)
        assert (scratch.train.model, scratch.train.router) == (base.train.model, base.train.router)
        assert adapted.train.batches == scratch.train.batches
        assert adapted.train.evaluate_tokens == scratch.train.evaluate_tokens
        assert {train.schedule.kind for train in (adapted.train, scratch.train)} == {"constant"}
        assert planned[adapted.name].total_params == planned[scratch.name].total_params


def test_the_quick_settings_make_a_shorter_run_of_one_task() -> None:
    config = load_config(CONFIGS / "claims-reuse.yaml", reuse_against_scratch._quick_settings())
    assert [stage.name for stage in config.stages][-3:] == ["base", "adapted-modern", "scratch-modern"]
    assert max(stage.train.steps for stage in config.stages if isinstance(stage, Pretrain | Finetune)) == 20


@pytest.mark.slow
@pytest.mark.parametrize("entry", [reuse_against_scratch, upcycling_against_dense])
def test_a_quick_run_trains_and_says_that_it_proves_nothing(entry: Any, tmp_path: Path) -> None:
    claim = entry.ENTRY.audit(Bench(lambda name: load_site(name).machine, tmp_path, quick=True))
    assert claim.verdict == "cannot be told"
    assert all(line.value is not None for line in claim.measured if line.name.startswith("held-out loss"))
