"""Several runs side by side: what differs, what came out, what it cost."""

import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from hpc.report import compare
from hpc.report.gather import gather
from launch import main
from tests.report.browser import NEEDS_CHROMIUM, Browser
from tests.report.synthetic import CHAIN, SyntheticRun, quality, whole_run


def small(root: Path, perplexity: float, watts: float, lr: float, **more: object) -> Path:
    """A run of one text, one pretraining without losses, one evaluation."""
    stages = [one for one in yaml.safe_load(CHAIN)["stages"] if one["name"] in ("text", "pretrain", "evaluate")]
    stages[1]["train"]["optimizer"]["lr"] = lr
    stages[2]["needs"] = ["pretrain", "text"]
    run = SyntheticRun(root, name=root.name, stages=stages, **more)
    run.simple("text", {"unigram_loss": 6.2})
    run.begin("pretrain", 1, ["n1"], 4)
    run.sample("pretrain", 1, "n1", watts, 100)
    run.step_rows("pretrain", 1, 1, 60, 100, 1e4, 16384)
    run.end("pretrain", 1, 100)
    run.receipt("pretrain", {"heldout_loss": 3.1, "tokens": 60 * 16384}, 1, 100)
    run.simple("evaluate", {"models": {"pretrain": quality(perplexity)}})
    return root


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [small(folder / "hot", 21.0, 500, 3e-3), small(folder / "cool", 23.5, 300, 1e-3, facility={})]


def rows(found: list[compare.Row]) -> dict[str, list[str]]:
    return {row.name: [cell.text + (" *" if cell.is_best else "") for cell in row.cells] for row in found}


def test_only_what_differs_is_listed_of_the_configuration(pair: list[Path]) -> None:
    found = rows(compare.differences([gather(root) for root in pair]))
    assert found == {"stages.pretrain.train.optimizer.lr": ["0.003", "0.001"]}


def test_a_stage_that_one_run_lacks_is_one_row(pair: list[Path], tmp_path: Path) -> None:
    other = whole_run(tmp_path / "long")
    found = rows(compare.differences([gather(pair[0]), gather(other.root)]))
    assert found["stages.quantize"] == ["–", "quantize"]
    assert not [key for key in found if key.startswith("stages.quantize.")]


def test_quality_and_cost_mark_the_smaller_figure_and_leave_a_dash_for_the_unknown(pair: list[Path]) -> None:
    told = [gather(root) for root in pair]
    assert rows(compare.quality(told))["perplexity of pretrain on text"] == ["21.0 *", "23.5"]
    cost = rows(compare.cost(told))
    energies = [run.energy_j or 0.0 for run in told]
    assert energies[0] > energies[1]
    assert cost["energy of the nodes"][1].endswith(" *")
    assert cost["carbon, CO2e"] == [f"{energies[0] / 3.6e6 * 1.15 * 1.1 * 41.5:,.3g} g", "–"]


def test_a_lower_bound_is_never_called_the_smallest(pair: list[Path], tmp_path: Path) -> None:
    incomplete = whole_run(tmp_path / "incomplete")
    cost = rows(compare.cost([gather(pair[0]), gather(incomplete.root)]))
    assert cost["energy of the nodes"][1].startswith("≥ ")
    assert not any(text.endswith("*") for text in cost["energy of the nodes"])
    assert cost["energy complete"] == ["yes", "no: lower bounds"]


@NEEDS_CHROMIUM
def test_the_comparison_is_a_page_that_a_browser_draws(pair: list[Path], browser: Browser, tmp_path: Path) -> None:
    out = tmp_path / "two.html"
    result = CliRunner().invoke(main, ["report", *map(str, pair), "--out", str(out)])
    assert result.output == f"report: {out}\n"
    assert re.search(r"<h1>hot\s+·\s+cool\s*</h1>", out.read_text())
    browser.open(out, 390)
    assert browser.problems() == []
    assert browser.ask("document.documentElement.scrollWidth") == 390
    names = "document.querySelector('.figure').data.map(trace => trace.name)"
    assert browser.ask(names) == ["hot, training", "hot, held out", "cool, training", "cool, held out"]
