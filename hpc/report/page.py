"""report.html: one self-contained page about a run. Every figure says how it was come by; nothing is loaded from
anywhere.

plotly.js is 4.8 MB; the page carries it compressed (2 MB as text) and unpacks it in the browser, which every browser
since 2023 can. Figures are JSON beside it; one script draws them in the colours of the reader's scheme.
"""

import base64
import gzip
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hpc.report import account, chain, energy_figures, figures, words
from hpc.report.facts import TRAINED, RunFacts, StageFacts
from hpc.report.figures import Figure
from hpc.report.series import POINTS
from hpc.run.directory import storage_errors


def write_report(run: RunFacts, path: Path) -> None:
    """Write the page: whole or not at all. Raises StorageError."""
    publish(
        path,
        environment()
        .get_template("report.html.j2")
        .render(
            title=f"{run.name} · GreenMoE report",
            run=run,
            words=words,
            account=account,
            points=POINTS,
            chain_across=Markup(chain.chain_svg(run.chain, chain_labels(run), downwards=False)),
            chain_down=Markup(chain.chain_svg(run.chain, chain_labels(run), downwards=True)),
            figures=embed(draw(run)),
            plotly=plotly_script(),
        ),
    )


def publish(path: Path, page: str) -> None:
    """Put a page in its place, whole or not at all. Raises StorageError."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        staging.write_text(page, encoding="utf-8")
        staging.replace(path)


def environment() -> Environment:
    """Templates of this package, with the words' filters."""
    found = Environment(
        loader=PackageLoader("hpc.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    found.filters.update(
        figure=words.show, seconds=words.seconds, joules=words.joules, badge=words.badge, megabytes=words.megabytes,
        moment=words.moment, kilograms=words.kilograms,
    )  # fmt: skip
    return found


@cache
def plotly_script() -> Markup:
    """plotly.js, gzip in base64, for the page's loader."""
    packed = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9)).decode()
    return Markup('<script type="text/plain" id="plotly">{}</script>').format(packed)


def embed(drawn: Mapping[str, Figure | None]) -> dict[str, Markup]:
    """Each figure as HTML: a place and its JSON, in which no text can end the script. Empty for one without data."""

    def html(figure: Figure | None) -> Markup:
        if figure is None:
            return Markup("")
        text = json.dumps(figure, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
        height = int(figure["layout"]["height"])
        return Markup(
            f'<div class="figure" style="height:{height}px"></div><script type="application/json">{text}</script>'
        )

    return {name: html(figure) for name, figure in drawn.items()}


def chain_labels(run: RunFacts) -> dict[str, str]:
    """A line for each box of the chain: how long, how much; or where it is."""
    labels = {}
    for stage in run.stages:
        if stage.state == "done":
            known = [words.seconds(stage.seconds), words.joules(stage.energy_j)]
            labels[stage.name] = " · ".join(word for word in known if word != words.DASH)
        else:
            labels[stage.name] = (
                stage.state if stage.energy_j is None else f"{stage.state} · {words.joules(stage.energy_j)}"
            )
    return labels


def draw(run: RunFacts) -> dict[str, Figure | None]:
    """All figures; None for one that has no data."""
    trained = [stage for stage in run.of_kind(*TRAINED) if stage.history]
    curves = {stage.name: stage.history for stage in trained}
    adapters = {stage.name: stage.history for stage in run.of_kind("lora") if stage.history}
    unigram = next((stage.metrics.get("unigram_loss") for stage in run.of_kind("prepare")), None)
    return {
        "loss_tokens": figures.loss_curves(curves, "tokens", unigram),
        "loss_energy": figures.loss_curves(curves, "energy", unigram),
        "learning_rate": figures.learning_rate(curves),
        "busiest_expert": figures.busiest_expert(curves),
        **router_figures(trained),
        "adapter_curves": figures.loss_curves(adapters, "tokens"),
        "adapter_bars": adapter_bars(run),
        "size_quality": figures.size_quality(sized(run)),
        "power": energy_figures.power(run.stages),
        "energy_bars": energy_figures.energy_bars(*useful_and_lost(run)),
        "goodput": goodput_figure(run),
    }


def router_figures(trained: list[StageFacts]) -> dict[str, Figure | None]:
    """Load and entropy of the routers of the last pretraining that logged them."""
    logged = [stage for stage in trained if any(row.get("router_load") for row in stage.history)]
    if not logged:
        return {"router_load": None, "router_entropy": None}
    rows = logged[-1].history
    load = next(row["router_load"] for row in reversed(rows) if row.get("router_load"))
    return {"router_load": figures.router_load(load), "router_entropy": figures.router_entropy(rows)}


def adapter_bars(run: RunFacts) -> Figure | None:
    """Held-out loss before and after each adapter."""
    pairs = {
        stage.name: (stage.metrics["heldout_loss_before"], stage.metrics["heldout_loss"])
        for stage in run.of_kind("lora")
        if stage.metrics.get("heldout_loss_before") is not None and stage.metrics.get("heldout_loss") is not None
    }
    return figures.before_after(pairs) if pairs else None


def sized(run: RunFacts) -> dict[str, tuple[float, float, float | None, str]]:
    """Models with a size and a perplexity on the first token set that all of them were measured on."""
    rows = [row for row in words.model_rows(run) if row["perplexity"] and row["size_bytes"] is not None]
    shared = [name for name in words.token_sets(run) if all(name in row["perplexity"] for row in rows)]
    if not shared:
        return {}
    return {
        row["name"]: (row["size_bytes"] / 1e6, row["perplexity"][shared[0]], row["lineage_j"], row["kind"])
        for row in rows
    }


def useful_and_lost(run: RunFacts) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    """Joules of every stage whose joules are known, and its kind."""
    ledgers = [stage for stage in (run.ledger.stages if run.ledger else ()) if stage.energy_j is not None]
    return (
        {stage.name: (stage.useful_j or 0.0, stage.lost_j or 0.0) for stage in ledgers},
        {stage.name: stage.kind for stage in ledgers},
    )


def goodput_figure(run: RunFacts) -> Figure | None:
    """Time and energy of the whole run, part by part."""
    if run.goodput is None:
        return None
    rows: dict[str, dict[str, float]] = {"time": run.goodput.seconds}
    units = {"time": "s", "energy": "kWh"}
    if all(value is not None for value in run.goodput.energy_j.values()):
        rows["energy"] = {part: (value or 0.0) / figures.JOULES_PER_KWH for part, value in run.goodput.energy_j.items()}
    return energy_figures.goodput_bars(rows, units)
