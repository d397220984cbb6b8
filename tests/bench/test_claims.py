"""`bench claims`: the frame, and each audit's arithmetic recomputed by other means."""

import ast
import json
import operator
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hpc.bench import claims
from hpc.bench.claims import (
    moe_on_paper,
    registry,
    relora_against_full_rank,
    retrain_47b,
    run_47b_on_m2,
    scratch_in_an_hour,
    ten_kw_needs_thirty,
)
from hpc.bench.claims.claim import Bench, Claim, Step
from hpc.bench.claims.page import page
from hpc.bench.claims.scaling_laws import chinchilla, joint_law
from hpc.config.load import load_config
from hpc.errors import ConfigError
from hpc.plan.plan import plan
from slurm.site import load_site
from tests.conftest import Launch

ON_PAPER = (retrain_47b, run_47b_on_m2, scratch_in_an_hour, ten_kw_needs_thirty)
TRAINED = (moe_on_paper, relora_against_full_rank)
"""What is on paper of the entries that train."""
OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: pow,
}  # fmt: skip


def bench(tmp_path: Path) -> Bench:
    return Bench(machine=lambda name: load_site(name).machine, folder=tmp_path)


def pocket_calculator(line: str) -> float:
    """What somebody gets who types a line of the page into a calculator."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        assert isinstance(node, ast.Constant), line
        return float(node.value)

    return value(ast.parse(line.replace(" x ", " * ").replace("^", "**"), mode="eval").body)


def values(steps: tuple[Step, ...]) -> dict[str, float]:
    return {step.name: step.value for step in steps}


@pytest.fixture
def audits(tmp_path: Path) -> dict[str, Claim]:
    return {module.NAME: module.audit(bench(tmp_path)) for module in ON_PAPER}


def test_every_line_of_arithmetic_gives_its_value_on_a_calculator(audits: dict[str, Claim]) -> None:
    steps = [step for claim in audits.values() for step in claim.arithmetic]
    steps += [step for module in TRAINED for step in module.arithmetic()]
    assert len(steps) > 60
    for step in steps:
        assert pocket_calculator(step.line) == pytest.approx(step.value, rel=1e-3), f"{step.name}: {step.line}"


def test_the_calculator_is_no_yes_man() -> None:
    assert pocket_calculator("(2 + 3) x 2^-1 - 1e+01 / 4") == 0


def test_every_figure_has_a_source_and_every_verdict_its_conditions(audits: dict[str, Claim]) -> None:
    premises = [p for claim in audits.values() for p in claim.premises]
    premises += [premise for module in TRAINED for premise in module.premises()]
    for premise in premises:
        words = (
            "http",
            "arXiv:",
            "assumed",
            "measured",
            "estimated",
            "data sheet",
            "configs/",
            "the same page",
            "AVX2",
        )
        assert any(word in premise.source for word in (*words, "the article")), premise
    for claim in audits.values():
        assert len(claim.depends_on) >= 3
        assert "  - " in page([claim])
        assert claim.verdict.upper() in page([claim])


def test_json_is_one_object_with_all_claims(launch: Launch) -> None:
    only = [word for module in ON_PAPER for word in ("--only", module.NAME)]
    found = json.loads(launch("bench", "claims", "--json", *only).stdout)
    assert [claim["name"] for claim in found["claims"]] == [module.NAME for module in ON_PAPER]
    assert {"statement", "said_by", "kind", "premises", "arithmetic", "measured", "verdict", "depends_on"} <= set(
        found["claims"][0]
    )


def test_an_unknown_claim_is_one_line_with_the_known_ones(launch: Launch) -> None:
    result = launch("bench", "claims", "--only", "retrain-48b")
    assert result.returncode == ConfigError.exit_code
    assert len(result.stderr.strip().splitlines()) == 1
    assert "retrain-47b" in result.stderr


def test_a_new_entry_is_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_new_claim.py").write_text(
        "from hpc.bench.claims.claim import Claim, Entry\n"
        "def audit(bench): return Claim('a-new-claim', 'S', 'B', 'on paper', 'holds', 'because', ('nothing',))\n"
        "ENTRY = Entry('a-new-claim', 'S', 'on paper', audit)\n"
    )
    monkeypatch.setattr(claims, "__path__", [*claims.__path__, str(tmp_path)])
    assert [claim.because for claim in registry.audit(("a-new-claim",), bench(tmp_path))] == ["because"]
    assert len(registry.entries()) == len({entry.name for entry in registry.entries()}) >= 5


# Scaling laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "flops", "active", "tokens"),
    [(1, 1e20, 1.7e9, 9.7e9), (8, 1e20, 990e6, 17e9), (32, 1e21, 2.85e9, 58.4e9), (8, 1e22, 14.4e9, 115.8e9)],
)
def test_the_joint_law_has_the_optima_that_its_paper_prints(
    experts: int, flops: float, active: float, tokens: float
) -> None:
    """arXiv:2502.05172, table 1."""
    best = joint_law(experts).optimum(flops)
    assert best.active_params == pytest.approx(active, rel=0.02)
    assert best.tokens == pytest.approx(tokens, rel=0.02)


def test_the_joint_law_has_the_coefficients_that_its_paper_prints() -> None:
    """arXiv:2502.05172, table 4."""
    law = joint_law(16)
    assert (law.m, law.mu, law.n, law.nu) == pytest.approx((19.0159, -0.1617, 167.5073, -0.2494), rel=2e-3)


def test_an_optimum_is_one_and_its_flops_lead_back_to_its_loss() -> None:
    law = chinchilla()
    best = law.optimum(1e21)
    for shift in (0.9, 1.1):
        assert law.loss(best.active_params * shift, best.tokens / shift) > best.loss
    assert 6 * best.active_params * best.tokens == pytest.approx(1e21)
    assert law.flops_for(best.loss) == pytest.approx(1e21, rel=1e-6)


def test_more_experts_and_more_flops_save_more() -> None:
    saved = [moe_on_paper.saved_flops(experts, flops) for experts, flops in ((8, 1e20), (8, 1e22), (32, 1e22))]
    assert saved == sorted(saved)
    assert saved[0] == pytest.approx(0.405, abs=0.002)
    assert moe_on_paper.saved_flops(1, 1e20) == pytest.approx(0, abs=1e-6)


# Audits ---------------------------------------------------------------------------------------------------------------


def test_thirty_kilowatts_for_ten_is_a_pue_of_three(audits: dict[str, Claim]) -> None:
    claim = audits["ten-kw-needs-thirty"]
    found = values(claim.arithmetic)
    assert found["PUE that the claim asks for"] == 3.0
    assert found["10 kW of IT at the average PUE of the industry in 2023"] == pytest.approx(10 + 10 * 0.58)
    assert claim.verdict == "does not hold here"


def test_47b_in_4_bits_fits_one_card_and_ten_kilowatt_hours(audits: dict[str, Claim]) -> None:
    claim = audits["retrain-47b"]
    found = values(claim.arithmetic)
    adapters = 32 * 8 * 16 * ((4096 + 2 * 14336) + (14336 + 4096))
    base = 46.7e9 * 4.127 / 8 / 1e9
    assert found["memory in all"] == pytest.approx(base + adapters * 16 / 1e9 + 4.75, abs=0.5)
    assert found["memory in all"] < 48 < 80 < found["memory to train all weights"]
    assert found["energy in 10 h, one H100"] == pytest.approx(9.5)
    assert found["tokens in 10 h, one H100"] == pytest.approx(30.7e6, rel=1e-3)
    assert found["FLOPs to pretrain it on 20 tokens per active parameter"] == pytest.approx(120 * 12.88e9**2, rel=1e-3)
    assert claim.verdict == "holds if"


def test_an_hour_at_epcc_is_what_the_plan_of_the_recipe_says(audits: dict[str, Claim]) -> None:
    claim = audits["scratch-in-an-hour"]
    found = values(claim.arithmetic)
    planned = plan(load_config(scratch_in_an_hour.RECIPE), load_site("archer2-gpu").machine)
    stage = next(stage for stage in planned.stages if stage.name == "pretrain")
    prepared_s = 4500 * 524288 * 4.4 / 1.25e6 / 32
    assert found[scratch_in_an_hour.MINUTES] == pytest.approx(((stage.time.value or 0) + prepared_s) / 60)
    assert found[scratch_in_an_hour.ENERGY] == pytest.approx((stage.energy.value or 0) / 3.6e6)
    assert found[scratch_in_an_hour.PART] == pytest.approx(0.25, rel=0.05), "the site's, but for the start"
    assert 45 < found[scratch_in_an_hour.MINUTES] < 60
    tokens, active = 4500 * 524288, stage.active_params or 0
    expected = 21.833 * active**-0.1676 + 119.9126 * tokens**-0.2338 + 1.3637
    assert found[scratch_in_an_hour.LOSS] == pytest.approx(expected, rel=2e-3)
    assert 20 < tokens / active < 40
    assert claim.verdict == "holds if"


def test_a_slower_machine_does_not_make_it_in_an_hour(tmp_path: Path) -> None:
    slow = load_site("archer2-gpu", ["machine.expected_mfu=0.1"]).machine
    claim = scratch_in_an_hour.audit(replace(bench(tmp_path), machine=lambda name: slow))
    assert claim.verdict == "does not hold here"


def test_the_command_in_the_recipes_head_plans_it(launch: Launch) -> None:
    result = launch("plan", scratch_in_an_hour.RECIPE, "--site", "archer2-gpu", "--site-set", "slurm.account=x")
    assert result.returncode == 0, result.stderr
    assert "2x4" in result.stdout


def test_the_recipe_asks_for_no_more_than_the_site_gives() -> None:
    config = load_config(scratch_in_an_hour.RECIPE)
    text, pretrain, _ = plan(config, load_site("archer2-gpu").machine).stages
    assert text.time.value is None, "the text is the user's, and not here"
    assert (pretrain.nodes, pretrain.ranks_per_node) == (2, 4)
    assert (pretrain.memory_per_rank.value or 0) < 59 * 2**30
