"""The page of a run: honest about what is missing, drawn by a real browser at two widths in two colour schemes."""

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc.energy.ledger import Reconciled, run_ledger
from hpc.report import account, words
from hpc.report.energy_figures import power
from hpc.report.facts import RunFacts
from hpc.report.gather import gather
from hpc.report.page import write_report
from hpc.report.series import POINTS, Clock, Thinner, read_power
from hpc.run.directory import StageDirectory
from hpc.run.origin import Ancestor, write_origins
from launch import main
from tests.report.browser import NEEDS_CHROMIUM, Browser
from tests.report.synthetic import SyntheticRun, pretraining, whole_run


@pytest.fixture(scope="module")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("runs") / "synthetic").root


@pytest.fixture(scope="module")
def facts(run_root: Path) -> RunFacts:
    return gather(run_root)


@pytest.fixture(scope="module")
def page(run_root: Path, facts: RunFacts) -> Path:
    path = run_root / "report.html"
    write_report(facts, path)
    return path


def visible(page: Path) -> str:
    """The page without its scripts, on one line for each piece of text."""
    return re.sub(r"<script.*?</script>|<style.*?</style>", "", page.read_text(), flags=re.DOTALL)


def cells(page: Path, first: str) -> list[str]:
    """Text of the cells of the table row that begins with `first`."""
    row = re.search(rf"<tr><td>{re.escape(first)}\b.*?</tr>", visible(page), re.DOTALL)
    assert row is not None, first
    return [
        " ".join(re.sub(r"<[^>]+>", "", cell).split()) for cell in re.findall(r"<td.*?</td>", row.group(), re.DOTALL)
    ]


def test_text_of_a_model_cannot_inject_markup(page: Path) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.read_text()
    assert "<script>alert(1)" not in page.read_text()


def test_missing_nodes_are_named_in_a_warning_and_totals_are_lower_bounds(page: Path) -> None:
    alert = re.search(r'<div class="warning" role="alert">.*?</div>', visible(page), re.DOTALL)
    assert alert is not None
    assert "Energy is incomplete: totals are lower bounds" in alert.group()
    assert "attempt 1: node n3 (declared dead) reported until" in alert.group()
    assert "attempt 2: node n4 reported nothing" in alert.group()
    assert re.search(r"<b>≥ \d+ Wh", visible(page))


def test_lost_work_is_listed_with_its_energy_and_reason(page: Path, facts: RunFacts) -> None:
    assert facts.ledger is not None
    rows = account.lost_rows(facts)
    assert sum(row["energy_j"] for row in rows) == pytest.approx(facts.ledger.lost_j)
    assert (rows[0]["what"], rows[0]["attempt"], rows[0]["steps"]) == ("steps done again", 1, 30)
    assert "node n3 was lost; on from the checkpoint of step 100" in visible(page)


def test_energy_of_a_lineage_counts_each_stage_once(facts: RunFacts) -> None:
    parts = [facts.stage(name).energy_j for name in ("text", "pretrain", "lora", "merge")]
    assert facts.lineage_j(facts.stage("merge")) == pytest.approx(sum(part or 0 for part in parts))


def test_the_footprint_is_apart_and_each_row_has_its_source_and_year(page: Path, facts: RunFacts) -> None:
    kwh = (facts.energy_j or 0) / 3.6e6
    assert cells(page, "all of it")[1:] == [
        f"{kwh * 1.15 * 1.1:.4g} kWhD",
        "PUE 1.1 x nodes and other IT",
        "site report, 2025",
    ]
    assert cells(page, "water")[1:] == [
        f"{kwh * 1.15 * 0.4:.4g} LD",
        "0.4 L/kWh x nodes and other IT",
        "site report, 2025",
    ]
    assert cells(page, "carbon of all of it")[3] == "grid operator, 2024; site report, 2025"
    assert cells(page, "IT energy of the nodes")[1] == f"≥ {kwh:.4g} kWhM"


def test_a_run_that_only_began_has_a_page_with_dashes_and_no_zeros(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "young", facility={})
    run.begin("text", 1, ["n1"], 2)
    page = tmp_path / "young.html"
    write_report(gather(run.root), page)
    assert "0 of 6 stages are done" in visible(page)
    assert "text gives no sign of life" in visible(page)
    assert "0 Wh" not in visible(page)
    assert "The run is not finished" in visible(page)


def test_a_stage_that_wrote_something_just_now_is_running(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "live")
    run.now = time.time() - 60
    run.begin("text", 1, ["n1"], 2)
    run.sample("text", 1, "n1", 400, 58, ends=False)
    progress = {"attempt": 1, "time": time.time(), "text": "tokenizing", "done": 30, "total": 120}
    (run.root / "stages/text/progress.json").write_text(json.dumps(progress))
    told = gather(run.root)
    assert (told.stage("text").state, told.stage("text").text) == ("running", "tokenizing 25 %")
    assert told.stage("text").attempts[0].outcome == "running"
    assert words.progress_line(told) == "0 of 6 stages are done; text is running"


def test_failed_and_missing_stages_are_told_and_the_rest_is_there(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "broken")
    run.simple("text", {"unigram_loss": 6.2, "unigram_perplexity": 492.7})
    run.begin("pretrain", 1, ["n1"], 4)
    run.sample("pretrain", 1, "n1", 400, 60)
    run.step_rows("pretrain", 1, 1, 20, 60, 1e4, 16384)
    run.end("pretrain", 1, 60, "failed", "CUDA error: an illegal <b>memory</b> access")
    page = tmp_path / "broken.html"
    write_report(gather(run.root), page)
    assert "pretrain failed" in visible(page)
    assert "illegal &lt;b&gt;memory&lt;/b&gt; access" in visible(page)
    assert "Loss against energy" in visible(page)
    assert "Quality, size and energy" not in visible(page), "no model is done"


def test_a_site_that_states_nothing_gets_no_pue_no_water_and_no_carbon(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "plain", facility={})
    run.simple("text", {"unigram_loss": 6.2})
    page = tmp_path / "plain.html"
    write_report(gather(run.root), page)
    assert "The site states no PUE, WUE or carbon intensity, so none is applied" in visible(page)
    assert "CO2e" not in visible(page)


def test_estimates_are_said_to_be_estimates(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "guess")
    run.begin("text", 1, ["n1"], 2)
    run.sample("text", 1, "n1", 15, 30, source="estimated: a power model")
    run.end("text", 1, 30)
    run.receipt("text", {"unigram_loss": 6.2}, 1, 30)
    page = tmp_path / "guess.html"
    write_report(gather(run.root), page)
    assert "Some or all joules of this run are <b>estimates</b>" in visible(page)
    assert '<abbr class="badge estimated" title="estimated: a power model">E</abbr>' in visible(page)
    assert "(estimated) in" in words.headline(gather(run.root))


def test_a_damaged_receipt_costs_its_stage_and_not_the_page(run_root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "synthetic"
    shutil.copytree(run_root, copy)
    (copy / "stages/merge/receipt.json").write_text("{")
    stage = gather(copy).stage("merge")
    assert (stage.state, stage.metrics) == ("damaged", {})


def test_a_shared_node_is_a_visible_upper_bound_and_silent_counters_are_told(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "shared")
    run.begin("text", 1, ["n1"], 2)
    bound = "upper bound: the job has 8 of 64 CPUs, the whole node is counted"
    run.sample("text", 1, "n1", 400, 30, notes=(bound, "rapl: permission denied"), unsure=7200.0)
    run.end("text", 1, 30)
    run.receipt("text", {"unigram_loss": 6.2}, 1, 30)
    page = tmp_path / "shared.html"
    write_report(gather(run.root), page)
    alerts = " ".join(re.findall(r'<div class="warning".*?</div>', visible(page), re.DOTALL))
    assert f"n1: {bound}" in alerts
    assert "up to 2 Wh more may have been drawn" in visible(page)
    assert "<li>rapl: permission denied" in visible(page)


def test_what_a_run_started_from_is_stated_once_beside_its_own_energy(run_root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "synthetic"
    shutil.copytree(run_root, copy)
    base = Ancestor("/elsewhere/base-run", "pretrain", "d1", 7.2e6, users=2, share=0.5)
    for stage in ("lora", "merge"):
        write_origins(StageDirectory(copy / "stages" / stage), [base])
    write_report(gather(copy), copy / "report.html")
    assert cells(copy / "report.html", "base-run")[:4] == ["base-run", "pretrain", "2 kWh", "50 %"]
    assert visible(copy / "report.html").count("<td>base-run") == 1
    assert gather(copy).energy_j == gather(run_root).energy_j


def test_another_sources_joules_stand_beside_ours_with_the_difference(run_root: Path, tmp_path: Path) -> None:
    ledger = replace(run_ledger(run_root), reconciled=(Reconciled("sacct", 3.6e6, 3.24e6, "whole nodes"),))
    write_report(gather(run_root, ledger), tmp_path / "page.html")
    assert cells(tmp_path / "page.html", "sacct") == ["sacct", "1 kWh", "900 Wh", "+100 Wh", "whole nodes"]


def test_power_is_thinned_while_it_is_read_and_keeps_its_mean(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "long")
    run.begin("pretrain", 1, ["n1"], 4)
    run.sample("pretrain", 1, "n1", 400, 20_000, every=2)
    (power_of,) = read_power(run.root / "stages/pretrain")
    assert len(power_of.times) <= 1500
    assert sum(power_of.watts) / len(power_of.watts) == pytest.approx(400, rel=0.01)
    assert power_of.span_s >= 8


def test_a_figure_of_64_nodes_is_a_heat_map_of_bounded_size(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "wide")
    nodes = [f"n{number:02}" for number in range(64)]
    run.begin("pretrain", 1, nodes, 256)
    for number, node in enumerate(nodes):
        run.sample("pretrain", 1, node, 300 + number, 400, every=2)
    run.end("pretrain", 1, 400)
    told = gather(run.root)
    assert sum(len(node.times) for node in told.stage("pretrain").power) <= POINTS
    figure = power(told.stages)
    assert figure is not None
    (trace,) = figure["data"]
    assert (trace["type"], trace["y"]) == ("heatmap", nodes)
    assert trace["z"][63][150] - trace["z"][0][150] == pytest.approx(63, abs=25)
    assert len(json.dumps(figure)) < 200_000


def test_neighbours_merge_until_a_series_fits() -> None:
    thinner = Thinner(10)
    for second in range(160):
        thinner.add(1000.0 + second, float(second))
    times, values, span = thinner.means()
    assert len(times) == 10
    assert span == 16
    assert values[0] == sum(range(16)) / 16
    assert times[0] == 1000 + values[0]


def test_long_pauses_are_cut_out_of_the_axis_and_short_ones_stay() -> None:
    clock = Clock([(0.0, 1000.0), (1030.0, 2000.0), (99_000.0, 100_000.0)])
    assert clock.minutes(1030.0) - clock.minutes(1000.0) == pytest.approx(0.5)
    assert [seconds for _, seconds in clock.cuts] == [97_000.0]
    assert clock.minutes(99_000.0) - clock.minutes(2000.0) == pytest.approx(clock.longest_gap / 60)
    assert clock.minutes(99_600.0) - clock.minutes(99_000.0) == pytest.approx(10)


def test_report_writes_the_page_of_a_run_at_any_time(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "synthetic")
    run.simple("text", {"unigram_loss": 6.2})
    pretraining(run, scale=0.2)
    result = CliRunner().invoke(main, ["report", str(run.root)])
    assert result.exit_code == 0, result.output
    assert result.output == f"report: {run.root}/report.html\n"
    assert (run.root / "report.html").stat().st_size < 4_000_000
    assert CliRunner().invoke(main, ["report", str(tmp_path / "nothing")]).exit_code == 2


# In a browser ---------------------------------------------------------------------------------------------------------

CUT_TEXT = """
[...document.querySelectorAll(".figure svg text")].filter(t => { const f = t.closest(".figure").getBoundingClientRect(),
r = t.getBoundingClientRect(); return r.width && (r.left < f.left - 1 || r.right > f.right + 1 || r.top < f.top - 1 ||
r.bottom > f.bottom + 1) }).map(t => t.textContent)
"""
INVALID = """
[...document.querySelectorAll(".figure")].flatMap(f => Plotly.validate(f.data, f.layout) || []).map(p => p.msg)
"""
CONTRASTS = """
(() => { const shine = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(v => { v /= 255; return v <= .03928 ?
v / 12.92 : ((v + .055) / 1.055) ** 2.4 }); return .2126 * r + .7152 * g + .0722 * b };
const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
if (!/, 0\\)$|transparent/.test(c)) return c } return "rgb(255,255,255)" };
return [...document.querySelectorAll("main :is(h1,h2,h3,p,td,th,b,span,abbr,li,summary)")].filter(e =>
e.getClientRects().length && e.textContent.trim()).map(e => { const a = shine(getComputedStyle(e).color),
b = shine(ground(e)); return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName + e.textContent.slice(0, 30)]
}).filter(([ratio]) => ratio < 4.5).slice(0, 5) })()
"""


@NEEDS_CHROMIUM
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_looks_right(page: Path, browser: Browser, width: int, scheme: str) -> None:
    browser.open(page, width, scheme)
    figures = browser.ask("document.querySelectorAll('.figure').length")
    assert figures >= 11
    assert browser.ask(
        "[...document.querySelectorAll('.figure')].every(f => f.querySelector('.trace, .heatmaplayer image'))"
    )
    browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.problems() == [], "an error, or something asked for from a network"
    assert browser.ask("document.documentElement.scrollWidth") == width, "nothing is wider than the screen"
    assert browser.ask(CUT_TEXT) == []
    assert browser.ask(CONTRASTS) == []


@NEEDS_CHROMIUM
def test_figures_are_valid_and_follow_the_scheme_of_the_reader(page: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(page, 1280)
    assert browser.ask(INVALID) == []
    colour = "document.querySelector('.figure').layout.font.color"
    light = browser.ask(colour)
    browser.look(1280, "dark")
    browser.until(f"{colour} !== {json.dumps(light)}")
    browser.picture(tmp_path / "dark.png")
    assert (tmp_path / "dark.png").stat().st_size > 100_000
