"""ReLoRA against full rank: equal terms for all models, how it judges, and the rank that is read off weights."""

import math
from pathlib import Path

import pytest
import torch

from hpc.bench.claims import relora_against_full_rank
from hpc.bench.claims.claim import Bench
from hpc.bench.claims.curves import Point, Spent
from hpc.bench.claims.relora_against_full_rank import COMPARABLE, FULL, RATES, RELORA, Against, against, asked, judged
from hpc.bench.claims.trained import CONFIGS, Trained
from hpc.bench.rank_growth import update_rank
from hpc.config import Finetune, Lora, Relora
from hpc.config.load import load_config
from hpc.plan.plan import plan
from slurm.site import load_site


def test_all_models_learn_on_equal_terms() -> None:
    config = load_config(CONFIGS / relora_against_full_rank.FILE)
    stages = {stage.name: stage for stage in config.stages if isinstance(stage, Finetune | Relora | Lora)}
    assert stages.keys() == RATES.keys()
    assert {tuple(stage.needs) for stage in stages.values()} == {("warm-start", "text")}
    same = ("batches", "steps", "parallel", "checkpoint_every_steps", "checkpoint_async", "evaluate_tokens", "health")
    for key in same:
        assert len({str(getattr(stage.train, key)) for stage in stages.values()}) == 1, key
    assert len({(s.train.schedule.warmup_steps, s.train.schedule.min_lr_fraction) for s in stages.values()}) == 1
    assert {s.train.optimizer.lr for s in stages.values()} == {RATES[FULL][0]}, "the first rates are the file's"
    assert len({len(rates) for rates in RATES.values()}) == 1
    adapters = [stage.train for stage in stages.values() if isinstance(stage, Relora | Lora)]
    assert len({(train.rank, train.alpha, train.attention, train.experts) for train in adapters}) == 1


def test_one_cycle_differs_from_relora_in_its_restarts_alone() -> None:
    config = load_config(CONFIGS / relora_against_full_rank.FILE)
    relora, one = config.stage(RELORA), config.stage("one-cycle")
    assert isinstance(relora, Relora)
    assert isinstance(one, Relora)
    assert one.train.schedule.restart_every_steps == one.train.steps
    assert (relora.train.schedule.restart_every_steps or 0) * 5 == relora.train.steps
    assert relora.train.keep_every_steps == relora.train.schedule.restart_every_steps, "each cycle's end is kept"
    assert one.train == relora.train.model_copy(
        update={
            "keep_every_steps": None,
            "schedule": relora.train.schedule.model_copy(update={"restart_every_steps": one.train.steps}),
        }
    )


def test_a_quick_run_has_two_cycles_whose_ends_are_kept() -> None:
    models = (FULL, RELORA, "lora")
    settings = asked(models, 3, dict.fromkeys(models, 2e-3), quick=True)
    config = load_config(CONFIGS / relora_against_full_rank.QUICK_FILE, settings)
    relora = config.stage(RELORA)
    assert isinstance(relora, Relora)
    assert config.seed == 3
    assert relora.train.optimizer.lr == 2e-3
    assert (relora.train.steps, relora.train.schedule.restart_every_steps, relora.train.keep_every_steps) == (
        20,
        10,
        10,
    )
    assert {stage.name for stage in config.stages} == {"text", "warm-start", *models}


def test_the_plan_has_fewer_tensors_for_adapters_and_more_where_the_rest_is_trained_too() -> None:
    planned = plan(load_config(CONFIGS / relora_against_full_rank.FILE), load_site("local").machine)
    stages = {stage.name: stage for stage in planned.stages}
    full, relora, lora = (stages[name].memory for name in (FULL, RELORA, "lora"))
    assert full is not None
    assert relora is not None
    assert lora is not None
    sizes = [sum(part.bytes for part in memory.states) for memory in (full, relora, lora)]
    assert sizes == sorted(sizes, reverse=True)
    rest = (stages[RELORA].trainable_params or 0) - (stages["lora"].trainable_params or 0)
    assert rest > 1e6
    assert sizes[1] - sizes[2] == pytest.approx(rest / 2 * 12), "an fp32 copy and two moments, on one of two ranks"


# Rank -----------------------------------------------------------------------------------------------------------------


def test_the_rank_of_merged_updates_is_the_sum_of_theirs() -> None:
    """Also when the updates are a thousandth of the weights, which are rounded at each merge."""
    random = torch.Generator().manual_seed(1)
    weights = torch.randn(96, 128, generator=random) * 0.05
    merged = weights.clone()
    for cycle in range(1, 4):
        merged += 3e-6 * torch.randn(96, 5, generator=random) @ torch.randn(5, 128, generator=random)
        assert update_rank(weights, merged, cycle) == 5 * cycle


def test_rounding_is_no_rank() -> None:
    weights = torch.randn(96, 128, generator=torch.Generator().manual_seed(2))
    moved = weights * (1 + torch.finfo(torch.float32).eps)
    assert not torch.equal(weights, moved)
    assert update_rank(weights, moved) == 0
    assert update_rank(weights, weights + 0.01 * torch.randn(96, 128)) == 96


# Comparison and verdict -----------------------------------------------------------------------------------------------


def run(loss: float, memory: int | None, trainable: int | None = None, joules: float | None = 600.0) -> Trained:
    metrics = {"heldout_loss": loss, "peak_memory_bytes": memory, "tokens_per_s": 500.0, "total_params": 1000}
    if trainable is not None:
        metrics["trainable_params"] = trainable
    return Trained([Point(8, Spent(0, 0, 0.0)), Point(loss, Spent(1000, 60, joules))], metrics, "estimated: a model")


def test_a_model_is_compared_with_full_rank_of_its_run() -> None:
    found = against(2, {FULL: run(5.0, 800), RELORA: run(5.0 + math.log(1.1), 600, 250, joules=None)}, RELORA)
    assert (found.seed, found.model) == (2, RELORA)
    assert found.perplexity == pytest.approx(0.1)
    assert found.parts == {
        "peak memory of a rank": -0.25, "trainable parameters": -0.75, "tokens/s": 0.0, "energy": None,
    }  # fmt: skip


def relora(perplexity: float, memory: float | None, seed: int = 1) -> Against:
    return Against(
        seed, RELORA, perplexity, {"peak memory of a rank": memory, "trainable parameters": -0.7, "tokens/s": 0.2}
    )


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ((COMPARABLE, -0.1), (-0.01, -0.2), "holds"),
        ((COMPARABLE + 0.001, -0.1), (0.2, -0.1), "does not hold here"),
        ((0.0, 0.01), (0.0, 0.0), "does not hold here"),
        ((0.0, -0.1), (0.2, -0.1), "cannot be told"),
        ((0.0, -0.1), (0.0, None), "cannot be told"),
    ],
)
def test_as_well_and_with_less_memory_must_hold_in_every_seed(
    first: tuple[float, float], second: tuple[float, float | None], verdict: str
) -> None:
    for is_shared in (False, True):
        assert judged([relora(*first), relora(*second, seed=2)], quick=False, is_shared=is_shared)[0] == verdict


def test_a_quick_run_proves_nothing() -> None:
    assert judged([relora(-0.1, -0.5)], quick=True, is_shared=False)[0] == "cannot be told"


def test_speed_on_a_busy_machine_is_not_told_as_a_difference() -> None:
    quiet, busy = (judged([relora(0.1, -0.2), relora(0.2, -0.2, 2)], False, shared)[1] for shared in (False, True))
    assert "held-out perplexity +15.0% (seeds: +10.0%, +20.0%), peak memory of a rank -20.0%" in busy
    assert "tokens/s +20.0%" in quiet
    assert "tokens/s" not in busy
    assert "the machine worked for others too" in busy


def test_comparable_is_the_largest_published_gap() -> None:
    assert pytest.approx(19.32 / 18.66 - 1) == COMPARABLE


@pytest.mark.slow
def test_the_quick_run_trains_all_three_and_shows_that_the_rank_grows(tmp_path: Path) -> None:
    claim = relora_against_full_rank.audit(Bench(lambda name: load_site(name).machine, tmp_path, quick=True))
    assert claim.verdict == "cannot be told"
    told = {line.name: line.value for line in claim.measured}
    query = f"rank of the update of layer {relora_against_full_rank.LAYER}'s query matrix"
    assert [told[f"{query}, ReLoRA, cycle {cycle}"] for cycle in (1, 2)] == [16, 32]
    assert (told[f"{query}, full rank"] or 0) > 200
    assert (told["trainable parameters, relora"] or 0) < 0.5 * (told["trainable parameters, full-rank"] or 0)
    assert told["energy, lora"] is not None
