"""The entry that trains: what it reads off curves, how it judges, and that one expert is a dense model."""

from pathlib import Path

import pytest

from hpc.bench.claims import moe_against_dense
from hpc.bench.claims.claim import Bench
from hpc.bench.claims.curves import Point, Spent, first_reach, held_out_curve
from hpc.bench.claims.moe_against_dense import judged
from hpc.bench.claims.savings import Saving, compared
from hpc.bench.claims.trained import CONFIGS, Trained
from hpc.config import Model, Pretrain, Router
from hpc.config.load import load_config
from hpc.plan.plan import plan
from hpc.run.directory import append_jsonl
from slurm.site import load_site


def test_one_expert_is_a_dense_swiglu_model() -> None:
    """Logits and gradients of a Mixtral with one expert equal those of a Mistral with the same weights."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from hpc.model.build import build_model, model_config

    shape = Model(architecture="mixtral", hidden_size=32, num_layers=2, num_attention_heads=4, expert_size=48)
    config = model_config(shape, Router(num_experts=1, top_k=1), 96, 24, 0)
    mixtral = build_model(config, seed=3)
    mistral = MistralForCausalLM(
        MistralConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=48, max_position_embeddings=24, sliding_window=None, rope_theta=10000.0,
            tie_word_embeddings=False, rms_norm_eps=config.rms_norm_eps,
        )
    )  # fmt: skip
    state = {}
    for name, tensor in mixtral.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".mlp.")[0]
            state[f"{layer}.mlp.gate_proj.weight"], state[f"{layer}.mlp.up_proj.weight"] = tensor[0].chunk(2)
        elif name.endswith("experts.down_proj"):
            state[name.split(".mlp.")[0] + ".mlp.down_proj.weight"] = tensor[0]
        elif ".mlp.gate." not in name:
            state[name] = tensor
    mistral.load_state_dict(state, strict=True)
    ids = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(5))
    ours, theirs = mixtral(input_ids=ids).logits, mistral(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 1e-6 < ours.std()
    ours.square().mean().backward()
    theirs.square().mean().backward()
    name = "model.layers.1.self_attn.q_proj.weight"
    gradients = [dict(model.named_parameters())[name].grad for model in (mixtral, mistral)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-9)
    routers = [p.grad for name, p in mixtral.named_parameters() if ".mlp.gate." in name]
    assert len(routers) == 2
    assert all(grad is None or grad.abs().max() == 0 for grad in routers)


def test_the_dense_models_match_the_mixture_in_active_and_in_all_parameters() -> None:
    config = load_config(CONFIGS / "claims-moe-wide.yaml")
    stages = {stage.name: stage for stage in plan(config, load_site("local").machine).stages}
    moe, dense, wide = (stages[name] for name in (moe_against_dense.MOE, *moe_against_dense.RIVALS))
    routers = 4 * 256 * 8
    assert (moe.active_params or 0) - (dense.active_params or 0) == pytest.approx(routers, abs=4 * 256)
    assert (moe.total_params or 0) - (wide.total_params or 0) == pytest.approx(routers, abs=4 * 256)
    settings = [stage.train for stage in config.stages if isinstance(stage, Pretrain)]
    assert len({(train.batches, train.schedule, train.evaluate_tokens) for train in settings}) == 1
    assert {train.schedule.kind for train in settings} == {"constant"}


# Curves ---------------------------------------------------------------------------------------------------------------


def curve(*points: tuple[float, float, float, float | None]) -> list[Point]:
    return [Point(loss, Spent(tokens, seconds, joules)) for loss, tokens, seconds, joules in points]


def test_a_loss_between_two_measurements_is_reached_between_them() -> None:
    reached = first_reach(curve((8, 0, 0, 0), (6, 1000, 10, 300), (5, 3000, 50, 900)), 5.25)
    assert reached == Spent(2500, 40, 750)


def test_the_first_time_counts_where_a_curve_goes_up_again() -> None:
    assert first_reach(curve((8, 0, 0, 0), (6, 10, 1, 1), (7, 20, 2, 2), (5, 30, 3, 3)), 6.5) == Spent(7.5, 0.75, 0.75)


def test_a_loss_never_reached_costs_nothing_known() -> None:
    assert first_reach(curve((8, 0, 0, 0), (6, 10, 1, 1)), 5.9) is None


def test_joules_that_were_not_sampled_are_none() -> None:
    assert first_reach(curve((8, 0, 0, None), (6, 10, 1, 5.0)), 7) == Spent(5, 0.5, None)


def test_a_curve_starts_counting_at_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for row in (
        {"step": 0, "tokens": 0, "time": 100.0, "energy_j": 40.0, "heldout_loss": 8.0},
        {"step": 1, "tokens": 512, "time": 101.0, "energy_j": 55.0},
        {"step": 2, "tokens": 1024, "time": 103.0, "energy_j": 90.0, "heldout_loss": 7.0},
    ):
        append_jsonl(path, row)
    assert held_out_curve(path) == curve((8, 0, 0, 0), (7, 1024, 3, 50))


# Comparison and verdict -----------------------------------------------------------------------------------------------


def test_models_are_compared_at_the_lowest_loss_that_both_reached() -> None:
    moe = Trained(curve((8, 0, 0, 0), (5, 1000, 60, 600)), {"flops": 2e9, "tokens": 1e3}, "estimated: a model")
    dense = Trained(curve((8, 0, 0, 0), (6, 2000, 50, 500)), {"flops": 2e9, "tokens": 2e3}, "estimated: a model")
    saving = compared(1, moe, "dense", dense)
    assert saving.loss == 6
    assert saving.parts == pytest.approx(
        {"tokens": 1 - (2000 / 3) / 2000, "FLOPs": 1 - (2000 / 3) * 2 / 2000, "time": 1 - 40 / 50, "energy": 0.2}
    )


def saving(energy: float | None, rival: str = "dense", seed: int = 1) -> Saving:
    parts = {"energy": energy, "time": 0.1, "FLOPs": -0.07, "tokens": 0.3}
    return Saving(seed, rival, 5.0, parts, dict.fromkeys(parts, (1.0, 2.0)), "estimated: a model")


def test_the_claim_holds_only_if_every_seed_saves_so_much() -> None:
    assert judged([saving(0.7), saving(0.66)], quick=False, is_shared=False)[0] == "holds"
    verdict, because = judged([saving(0.7), saving(0.5)], quick=False, is_shared=False)
    assert verdict == "does not hold here"
    assert "energy -60% (seeds: -70%, -50%)" in because


def test_what_the_mixture_took_more_is_told_as_more() -> None:
    verdict, because = judged([saving(-0.25)], quick=False, is_shared=False)
    assert verdict == "does not hold here"
    assert "energy +25%" in because
    assert "FLOPs +7%" in because


@pytest.mark.parametrize(
    ("quick", "is_shared", "energy"), [(True, False, 0.9), (False, True, 0.9), (False, False, None)]
)
def test_no_verdict_from_a_quick_run_a_busy_machine_or_missing_joules(
    quick: bool, is_shared: bool, energy: float | None
) -> None:
    assert judged([saving(energy)], quick, is_shared)[0] == "cannot be told"


@pytest.mark.slow
def test_the_quick_run_trains_both_and_says_that_it_proves_nothing(tmp_path: Path) -> None:
    claim = moe_against_dense.audit(Bench(lambda name: load_site(name).machine, tmp_path, quick=True))
    assert claim.verdict == "cannot be told"
    told = {line.name.split(" against")[0]: line for line in claim.measured}
    assert told["FLOPs saved"].value is not None
    assert told["energy saved"].provenance.startswith("derived: ")
