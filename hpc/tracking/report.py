"""report.html: one self-contained page about a run, from plain data. Every figure says how it was come by."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hpc.plan.show import duration, energy
from hpc.tracking import report_figures as figures

DASH = "–"


@dataclass(frozen=True)
class StageReport:
    """One stage, as its receipt and its files tell it."""

    name: str
    kind: str
    needs: list[str]
    seconds: float | None
    attempts: int
    metrics: dict[str, Any]
    provenance: dict[str, str]
    size_bytes: int | None
    energy_j: float | None
    energy_provenance: str
    history: list[dict[str, Any]] = field(default_factory=list)
    """Rows of metrics.jsonl."""
    power: list[tuple[float, str, int, float]] = field(default_factory=list)
    """(unix time, host, attempt, watts)."""


@dataclass(frozen=True)
class RunReport:
    """A run."""

    name: str
    created: float
    code_version: str
    machine: str
    stages: list[StageReport]
    facility_notes: list[str]

    def stage(self, name: str) -> StageReport:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def of_kind(self, *kinds: str) -> list[StageReport]:
        """Stages of some kinds, in the order of the chain."""
        return [stage for stage in self.stages if stage.kind in kinds]

    def lineage_j(self, stage: StageReport) -> float | None:
        """Joules of a stage and of everything it was made from, each stage once; None when one is unknown."""
        seen: dict[str, float | None] = {}

        def visit(current: StageReport) -> None:
            if current.name not in seen:
                seen[current.name] = current.energy_j
                for need in current.needs:
                    visit(self.stage(need))

        visit(stage)
        known = [joules for joules in seen.values() if joules is not None]
        return sum(known) if len(known) == len(seen) else None


def write_report(run: RunReport, path: Path) -> None:
    """Write the page: whole or not at all."""
    environment = Environment(loader=PackageLoader("hpc.tracking", "."), autoescape=True, undefined=StrictUndefined)
    environment.filters.update(figure=show, duration=duration, energy=energy, badge=badge, megabytes=megabytes)
    page = environment.get_template("report.html.j2").render(
        run=run,
        created=datetime.fromtimestamp(run.created, UTC).strftime("%d %B %Y, %H:%M UTC"),
        headline=headline(run),
        cards=cards(run),
        models=list(model_rows(run)),
        token_sets=token_sets(run),
        evaluated_tokens=evaluated_tokens(run),
        samples=samples(run),
        stages=run.stages,
        metric_rows=metric_rows,
        energy_sources=sorted({stage.energy_provenance for stage in run.stages}),
        **{name: Markup(html) for name, html in draw(run).items()},
        plotly=Markup(f"<script>{get_plotlyjs()}</script>"),
    )
    staging = path.with_suffix(f".{os.getpid()}.tmp")
    staging.write_text(page, encoding="utf-8")
    staging.replace(path)


# Words and numbers ----------------------------------------------------------------------------------------------------


def show(value: Any, pattern: str = "{:,.4g}") -> str:
    """A figure for a table; a dash for what is unknown."""
    if value is None:
        return DASH
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else pattern.format(value)


def megabytes(value: int | None) -> str:
    """Bytes as MB (10^6)."""
    return DASH if value is None else f"{value / 1e6:,.1f} MB"


def badge(provenance: str | None) -> Markup:
    """A letter that says measured, derived or estimated, with the source as its title."""
    word = (provenance or "").split(":")[0]
    if word not in ("measured", "derived", "estimated"):
        return Markup("")
    return Markup('<abbr class="badge {}" title="{}">{}</abbr>').format(word, provenance, word[0].upper())


def headline(run: RunReport) -> str:
    """One sentence about what came out and what it cost."""
    trained = next((stage for stage in run.of_kind("pretrain")), None)
    words = []
    if trained and trained.metrics.get("heldout_perplexity") is not None:
        words.append(f"held-out perplexity {trained.metrics['heldout_perplexity']:.1f}")
        unigram = next((stage.metrics.get("unigram_perplexity") for stage in run.of_kind("prepare")), None)
        if unigram:
            words[-1] += f" where a unigram model has {unigram:.0f}"
    ratio = quantization_cost(run)
    if ratio is not None:
        words.append(f"quantization changes perplexity by {100 * (ratio - 1):+.1f} %")
    joules, seconds = total(run, "energy_j"), total(run, "seconds")
    if joules is not None:
        estimated = any("estimated" in stage.energy_provenance for stage in run.stages)
        words.append(f"{energy(joules)}{' (estimated)' if estimated else ''} in {duration(seconds)}")
    text = "; ".join(words) or "no model was trained in this run"
    return text[0].upper() + text[1:] + "."


def total(run: RunReport, attribute: str) -> float | None:
    """Sum over stages; None when one of them is unknown."""
    values = [getattr(stage, attribute) for stage in run.stages]
    return None if any(value is None for value in values) else float(sum(values))


def quantization_cost(run: RunReport) -> float | None:
    """Perplexity of the first quantized model over that of its source, on the token set where it costs most."""
    tables = [stage.metrics["models"] for stage in run.of_kind("evaluate")]
    for stage in run.of_kind("quantize"):
        for table in tables:
            source = next((need for need in stage.needs if need in table), None)
            if source and stage.name in table:
                ratios = [v["perplexity"] / table[source][key]["perplexity"] for key, v in table[stage.name].items()]
                return max(ratios, default=None)
    return None


def cards(run: RunReport) -> list[dict[str, Any]]:
    """The figures on top."""
    found: list[dict[str, Any]] = []

    def add(label: str, value: str, provenance: str | None) -> None:
        found.append({"label": label, "value": value, "provenance": provenance})

    trained = next(iter(run.of_kind("pretrain")), None)
    if trained:
        for label, key, pattern in (
            ("held-out perplexity", "heldout_perplexity", "{:.1f}"),
            ("parameters", "total_params", ""),
            ("active per token", "active_params", ""),
            ("training tokens/s", "tokens_per_s", "{:,.0f}"),
        ):
            value = trained.metrics.get(key)
            text = show(value, pattern) if pattern else DASH if value is None else f"{value / 1e6:.1f} M"
            add(label, text, trained.provenance.get(key))
    joules = total(run, "energy_j")
    if joules is not None:
        add("energy of the chain", energy(joules), run.stages[0].energy_provenance)
    if trained and trained.energy_j is not None and trained.metrics.get("tokens"):
        per_token = trained.energy_j / trained.metrics["tokens"]
        add("pretraining, J per token", f"{per_token:.2g}", trained.energy_provenance)
    seconds = total(run, "seconds")
    if seconds is not None:
        add("stages' wall time", duration(seconds), "measured: receipts, attempts that finished")
    ratio = quantization_cost(run)
    if ratio is not None:
        add("quantization: perplexity", f"{100 * (ratio - 1):+.1f} %", "derived: quantized / source, worst token set")
    return found


def token_sets(run: RunReport) -> list[str]:
    """Names of all token sets that some model was measured on."""
    names: dict[str, None] = {}
    for stage in run.of_kind("evaluate"):
        for row in stage.metrics["models"].values():
            names.update(dict.fromkeys(row))
    return list(names)


def evaluated_tokens(run: RunReport) -> str:
    """How many held-out tokens each model was measured on, by token set."""
    counts: dict[str, int] = {}
    for stage in run.of_kind("evaluate"):
        for row in stage.metrics["models"].values():
            counts.update({name: values["tokens"] for name, values in row.items()})
    return ", ".join(f"{count:,} tokens of {name}" for name, count in counts.items())


def model_rows(run: RunReport) -> Iterator[dict[str, Any]]:
    """Models side by side: perplexity on each token set, size, joules of the stage and of its whole lineage."""
    best: dict[str, float] = {}
    for stage in run.of_kind("evaluate"):
        for row in stage.metrics["models"].values():
            for key, values in row.items():
                best[key] = min(best.get(key, float("inf")), values["perplexity"])
    for stage in run.of_kind("evaluate"):
        for name, row in stage.metrics["models"].items():
            model = run.stage(name)
            yield {
                "name": name,
                "kind": model.kind,
                "perplexity": {key: values["perplexity"] for key, values in row.items()},
                "best": {key for key, values in row.items() if values["perplexity"] <= best[key]},
                "size_bytes": model.size_bytes,
                "bits": model.metrics.get("expert_bits_per_weight"),
                "energy_j": model.energy_j,
                "lineage_j": run.lineage_j(model),
                "energy_provenance": model.energy_provenance,
            }


def samples(run: RunReport) -> list[dict[str, Any]]:
    """Generated text, grouped by prompt: [{prompt, texts: [(model, continuation)]}]."""
    grouped: dict[str, list[tuple[str, str]]] = {}
    for stage in run.of_kind("evaluate"):
        for model, texts in stage.metrics.get("samples", {}).items():
            for sample in texts:
                text = sample["text"].removeprefix(sample["prompt"])
                grouped.setdefault(sample["prompt"], []).append((model, text))
    return [{"prompt": prompt, "texts": texts} for prompt, texts in grouped.items()]


def metric_rows(stage: StageReport) -> list[tuple[str, str, str | None]]:
    """(metric, value, provenance) of what fits a table cell."""
    return [
        (key, show(value), stage.provenance.get(key))
        for key, value in stage.metrics.items()
        if not isinstance(value, (dict, list))
    ]


# Figures --------------------------------------------------------------------------------------------------------------


def draw(run: RunReport) -> dict[str, str]:
    """All figures as HTML; an empty string for one that has no data."""
    kinds = {stage.name: stage.kind for stage in run.stages}
    labels = {
        s.name: " · ".join(word for word in (duration(s.seconds), energy(s.energy_j)) if word != "-")
        for s in run.stages
    }
    trained = next((stage for stage in run.of_kind("pretrain") if stage.history), None)
    unigram = next((stage.metrics.get("unigram_loss") for stage in run.of_kind("prepare")), None)
    adapters = {stage.name: stage for stage in run.of_kind("lora")}
    pairs = {
        name: (stage.metrics["heldout_loss_before"], stage.metrics["heldout_loss"])
        for name, stage in adapters.items()
        if stage.metrics.get("heldout_loss_before") is not None and stage.metrics.get("heldout_loss") is not None
    }
    load = (
        next((row["router_load"] for row in reversed(trained.history) if row.get("router_load")), None)
        if trained
        else None
    )
    rows = list(model_rows(run))
    first = next(iter(token_sets(run)), None)
    sized = {
        row["name"]: (row["size_bytes"] / 1e6, row["perplexity"][first])
        for row in rows
        if first in row["perplexity"] and row["size_bytes"] is not None
    }
    return {
        "chain": figures.chain_svg(run.stages, labels),
        "loss": figures.loss_curves({trained.name: trained.history}, unigram) if trained else "",
        "learning_rate": figures.learning_rate(trained.history) if trained else "",
        "adapter_curves": figures.loss_curves({n: s.history for n, s in adapters.items()}, None) if adapters else "",
        "adapter_bars": figures.before_after(pairs) if pairs else "",
        "router": figures.router_heatmap(load) if load else "",
        "balance": figures.router_balance(trained.history) if trained and load else "",
        "power": figures.power({stage.name: stage.power for stage in run.stages}, kinds),
        "energy_bars": figures.energy_bars({s.name: s.energy_j for s in run.stages if s.energy_j is not None}, kinds),
        "size_quality": figures.size_quality(sized) if sized else "",
    }
