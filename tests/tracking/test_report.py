"""The report: self-contained, honest about provenance, and really drawn by a browser."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpc.tracking.report import RunReport, StageReport, write_report

ESTIMATED = "estimated: CPU utilisation and a power model (made up)"


def stage(name: str, kind: str, needs: list[str], metrics: dict[str, Any], **more: Any) -> StageReport:
    values: dict[str, Any] = {
        "seconds": 12.5, "attempts": 1, "size_bytes": 1_500_000, "energy_j": 720.0, "energy_provenance": ESTIMATED,
        "provenance": dict.fromkeys(metrics, "measured: in a test"), **more,
    }  # fmt: skip
    return StageReport(name=name, kind=kind, needs=needs, metrics=metrics, **values)


def history(steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": n, "tokens": n * 2048, "loss": 8 - 0.03 * n, "lr": 1e-3, "router_max_over_mean": 2.0,
         "router_load": [[0.1, 0.2, 0.3, 0.4]] * 2}
        for n in range(1, steps)
    ]  # fmt: skip
    rows[-1]["heldout_loss"] = 5.0
    return rows


def quality(value: float) -> dict[str, Any]:
    return {"text": {"loss": 4.8, "perplexity": value, "bits_per_byte": 1.5, "tokens": 100, "tokens_per_s": 10.0}}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    evil = "<script>alert(1)</script>"
    run = RunReport(
        name="demo",
        created=1.8e9,
        code_version="0.1.0",
        machine="a test",
        facility_notes=[],
        stages=[
            stage("text", "prepare", [], {"unigram_loss": 6.5, "unigram_perplexity": 665.0}),
            stage(
                "pretrain", "pretrain", ["text"],
                {"heldout_perplexity": 121.0, "total_params": 9_448_000, "tokens": 800_000, "tokens_per_s": None},
                history=history(60), power=[(1000.0 + n, "n1", 1, 15.0) for n in range(60)],
            ),
            stage(
                "lora", "lora", ["pretrain", "text"], {"heldout_loss_before": 5.4, "heldout_loss": 5.3},
                history=history(20), power=[(1070.0 + n, "n1", 1, 14.0) for n in range(20)],
            ),
            stage("merge", "merge", ["pretrain", "lora"], {"max_abs_logit_difference": 1e-6}),
            stage("small", "quantize", ["merge"], {"expert_bits_per_weight": 4.13}, energy_j=None),
            stage(
                "evaluate", "evaluate", ["pretrain", "merge", "small", "text"],
                {
                    "models": {"pretrain": quality(121.0), "merge": quality(118.0), "small": quality(119.2)},
                    "samples": {"pretrain": [{"prompt": evil, "text": evil + " and more"}]},
                },
            ),
        ],
    )  # fmt: skip
    path = tmp_path / "report.html"
    write_report(run, path)
    return path


def visible(page: Path) -> str:
    """The page without its scripts."""
    return re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)


def test_the_page_loads_nothing_from_a_network(page: Path) -> None:
    assert not re.search(r"""<(script|link|img|iframe)[^>]*(src|href)=["']?(https?:)?//""", page.read_text())


def test_text_of_a_model_cannot_inject_markup(page: Path) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.read_text()
    assert "<script>alert(1)" not in page.read_text()


def test_estimated_joules_carry_their_badge(page: Path) -> None:
    assert f'0.2 Wh<abbr class="badge estimated" title="{ESTIMATED}">E</abbr>' in visible(page)


def test_what_is_unknown_is_a_dash_and_not_zero(page: Path) -> None:
    assert "<td>tokens_per_s</td><td>–<" in visible(page)
    small = re.search(r"<tr><td>small.*?</tr>", visible(page), re.DOTALL)
    assert small is not None
    assert "<td>-<" in small.group()
    assert "0 Wh" not in small.group()


def test_energy_of_a_lineage_counts_each_stage_once(page: Path) -> None:
    merged = re.search(r"<tr><td>merge.*?</tr>", visible(page), re.DOTALL)
    assert merged is not None
    assert "0.8 Wh" in merged.group()  # text, pretrain, lora, merge: 4 x 0.2


def test_without_stated_figures_no_pue_is_applied(page: Path) -> None:
    assert "The site states no PUE, WUE or carbon intensity" in visible(page)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here: apt-get install chromium")
def test_chromium_draws_every_figure_without_an_error(page: Path, tmp_path: Path) -> None:
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=8000", "--window-size=1280,3000", "--enable-logging=stderr",
    ]  # fmt: skip
    result = subprocess.run(
        ["chromium", *options, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120
    )
    drawn = result.stdout.count('class="main-svg"')
    figures = len(re.findall(r'class="plotly-graph-div', page.read_text()))
    assert figures >= 8
    assert drawn >= figures
    assert "Uncaught" not in result.stderr
    shot = tmp_path / "shot.png"
    subprocess.run(["chromium", *options, f"--screenshot={shot}", f"file://{page}"], capture_output=True, timeout=120)
    assert shot.stat().st_size > 100_000
