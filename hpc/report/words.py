"""Words and numbers of the page: what a reader should see first, and the rows of its tables."""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from hpc.plan.show import duration, energy
from hpc.report.account import emissions_kg, notes
from hpc.report.facts import TRAINED, RunFacts, StageFacts, provenance_kind

DASH = "–"
NOTES = 20
"""Notes of the samplers that are shown."""
NODE_ROWS = 256
"""Rows of the table of nodes, for one stage."""


def show(value: Any, pattern: str = "{:,.4g}") -> str:
    """A figure for a table; a dash for what is unknown."""
    if value is None:
        return DASH
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else pattern.format(value)


def joules(value: float | None) -> str:
    """An amount of energy; a dash for what is unknown."""
    return DASH if value is None else energy(value)


def seconds(value: float | None) -> str:
    """A duration; a dash for what is unknown."""
    return DASH if value is None else duration(value)


def megabytes(value: int | None) -> str:
    """Bytes as MB (10^6), or kB where they are few."""
    if value is None:
        return DASH
    return f"{value / 1e6:,.1f} MB" if value >= 1e5 else f"{value / 1e3:,.1f} kB"


def some(names: Sequence[str], most: int = 8) -> list[str]:
    """The first of many names, and how many more there are."""
    return [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]


def percent(change: float) -> str:
    """A change in per cent, with its sign."""
    text = f"{100 * change:+.1f} %"
    return "±0.0 %" if text[1:] == "0.0 %" else text


def moment(time: float) -> str:
    """Date and time, UTC."""
    return datetime.fromtimestamp(time, UTC).strftime("%d %b %Y, %H:%M UTC")


def badge(provenance: str | None) -> Markup:
    """A letter that says measured, derived or estimated, with the source as its title."""
    kind = provenance_kind(provenance)
    if not kind:
        return Markup("")
    return Markup('<abbr class="badge {}" title="{}">{}</abbr>').format(kind, provenance, kind[0].upper())


# The top of the page --------------------------------------------------------------------------------------------------


def progress_line(run: RunFacts) -> str:
    """How far the chain is, in a sentence."""
    done = [stage for stage in run.chain if stage.state == "done"]
    words = [f"{len(done)} of {len(run.chain)} stages are done"]
    words += [f"{stage.name} is {stage.state}" for stage in run.chain if stage.state in ("running", "stopped")]
    words += [f"{stage.name} failed" for stage in run.chain if stage.state in ("failed", "damaged")]
    words += [f"{stage.name} gives no sign of life" for stage in run.chain if stage.state == "silent"]
    return "; ".join(words)


def warnings(run: RunFacts) -> list[tuple[str, list[str]]]:
    """(what is wrong, details), the worst first; empty for a run that is done and fully accounted for."""
    found: list[tuple[str, list[str]]] = []
    if run.ledger is None:
        found.append(("No energy was recorded: every joule on this page is unknown.", []))
    elif run.ledger.missing:
        found.append(
            (
                "Energy is incomplete: totals are lower bounds. What is missing was not filled in.",
                list(run.ledger.missing),
            )
        )
    shared = [f"{', '.join(some(hosts))}: {note}" for note, hosts in notes(run) if note.startswith("upper bound")]
    if shared:
        found.append(("Nodes were not held alone: their joules are upper bounds.", shared))
    broken = [stage for stage in run.chain if stage.state in ("failed", "damaged", "silent")]
    if broken:
        found.append(("These stages have no result:", [f"{s.name}: {s.text or s.state}" for s in broken]))
    open_ones = [stage.name for stage in run.chain if stage.state in ("running", "stopped", "not started")]
    if open_ones:
        found.append((f"The run is not finished: figures are as of {moment(run.written)}.", [", ".join(open_ones)]))
    return found


def headline(run: RunFacts) -> str:
    """One sentence about what came out and what it cost."""
    words = []
    trained = next((s for s in run.of_kind(*TRAINED) if s.metrics.get("heldout_perplexity") is not None), None)
    if trained:
        words.append(f"held-out perplexity {trained.metrics['heldout_perplexity']:.1f}")
        unigram = next((s.metrics.get("unigram_perplexity") for s in run.of_kind("prepare")), None)
        if unigram:
            words[-1] += f" where a unigram model has {unigram:.0f}"
    ratio = quantization_cost(run)
    if ratio is not None:
        words.append(f"quantization changes perplexity by {percent(ratio - 1)}")
    if run.energy_j is not None:
        least = "" if run.is_complete else "at least "
        estimated = " (estimated)" if run.is_estimated else ""
        words.append(f"{least}{energy(run.energy_j)}{estimated}{lost_words(run)} in {duration(wall_s(run))}")
    text = "; ".join(words) or "no model was trained in this run yet"
    if words and not trained and any(stage.state != "done" for stage in run.chain):
        text = f"so far {text}"
    return text[0].upper() + text[1:] + "."


def lost_words(run: RunFacts) -> str:
    """', of which 12 % lost'; empty when nothing was."""
    if run.ledger is None or not run.ledger.lost_j or not run.ledger.energy_j:
        return ""
    share = 100 * run.ledger.lost_j / run.ledger.energy_j
    return f", of which {share:.0f} % lost" if share >= 1 else ", of which less than 1 % lost"


def wall_s(run: RunFacts) -> float | None:
    """Seconds from the first attempt (or its submission) to the last one's end."""
    if run.goodput:
        return run.goodput.wall_s
    spans = [(a.start, a.end) for stage in run.stages for a in stage.attempts]
    return max(end for _, end in spans) - min(start for start, _ in spans) if spans else None


def quantization_cost(run: RunFacts) -> float | None:
    """Perplexity of the first shrunken model over that of its source, on the token set where it costs most."""
    for stage in run.of_kind("quantize", "export"):
        for table in run.evaluations():
            source = next((need for need in stage.needs if need in table), None)
            if source and stage.name in table:
                ratios = [v["perplexity"] / table[source][key]["perplexity"] for key, v in table[stage.name].items()]
                return max(ratios, default=None)
    return None


def cards(run: RunFacts) -> list[dict[str, Any]]:
    """The figures on top."""
    found: list[dict[str, Any]] = []

    def add(label: str, value: str, provenance: str | None) -> None:
        found.append({"label": label, "value": value, "provenance": provenance})

    trained = next((stage for stage in run.of_kind(*TRAINED) if stage.metrics), None)
    if trained:
        add("held-out perplexity", show(trained.metrics.get("heldout_perplexity"), "{:.1f}"),
            trained.provenance.get("heldout_perplexity"))  # fmt: skip
        for label, key in (("parameters", "total_params"), ("active per token", "active_params")):
            value = trained.metrics.get(key)
            add(label, parameters(value), trained.provenance.get(key))
        add("training tokens/s", show(trained.metrics.get("tokens_per_s"), "{:,.0f}"),
            trained.provenance.get("tokens_per_s"))  # fmt: skip
    if run.ledger:
        sources = "; ".join(sorted({source for stage in run.ledger.stages for source in stage.provenance}))
        prefix = "" if run.is_complete else "≥ "
        add("energy of the nodes", prefix + joules(run.ledger.energy_j), sources)
        if run.ledger.lost_j:
            add("of it lost", joules(run.ledger.lost_j), f"derived: joules of lost work; {sources}")
    if trained and trained.energy_j is not None and trained.metrics.get("tokens"):
        add("pretraining, J per token", f"{trained.energy_j / trained.metrics['tokens']:.2g}",
            f"derived: all joules of the stage / tokens; {trained.energy_provenance}")  # fmt: skip
    if run.goodput:
        add("goodput", f"{100 * run.goodput.goodput:.0f} %", "derived: productive time / wall time, from records")
    carbon = emissions_kg(run)
    if carbon is not None:
        add("carbon, CO2e", kilograms(carbon), "derived: the site's carbon intensity x energy, see below")
    ratio = quantization_cost(run)
    if ratio is not None:
        add("quantization: perplexity", percent(ratio - 1), "derived: quantized / source, worst token set")
    return found


def parameters(value: float | None) -> str:
    """A number of parameters, in millions or billions (10^9)."""
    if value is None:
        return DASH
    return f"{value / 1e9:,.1f} B" if value >= 1e9 else f"{value / 1e6:,.1f} M"


def kilograms(value: float | None) -> str:
    """kg, or g where it is little; a dash for what is unknown."""
    if value is None:
        return DASH
    return f"{value:,.3g} kg" if value >= 1 else f"{1e3 * value:,.3g} g"


# Models ---------------------------------------------------------------------------------------------------------------


def token_sets(run: RunFacts) -> list[str]:
    """Names of all token sets that some model was measured on."""
    return list(dict.fromkeys(name for table in run.evaluations() for row in table.values() for name in row))


def evaluated_tokens(run: RunFacts) -> str:
    """How many held-out tokens each model was measured on, by token set."""
    counts = {
        name: values["tokens"] for table in run.evaluations() for row in table.values() for name, values in row.items()
    }
    return ", ".join(f"{count:,} tokens of {name}" for name, count in counts.items())


def model_rows(run: RunFacts) -> Iterator[dict[str, Any]]:
    """Artifacts that hold weights side by side: perplexity on each token set, size, joules of stage and lineage."""
    measured: dict[str, dict[str, float]] = {}
    for table in run.evaluations():
        for name, row in table.items():
            measured.setdefault(name, {}).update({key: values["perplexity"] for key, values in row.items()})
    best = {key: min(row[key] for row in measured.values() if key in row) for key in token_sets(run)}
    for stage in run.stages:
        found = measured.get(stage.name, {})
        if stage.produces not in ("model", "quantized", "exported") or (not found and stage.state != "done"):
            continue
        yield {
            "name": stage.name,
            "kind": stage.kind,
            "perplexity": found,
            "best": {key for key, value in found.items() if value <= best[key]},
            "size_bytes": stage.size_bytes,
            "bits": stage.metrics.get("expert_bits_per_weight"),
            "energy_j": stage.energy_j,
            "lineage_j": run.lineage_j(stage),
            "energy_provenance": stage.energy_provenance,
        }


def shrunk_rows(run: RunFacts) -> Iterator[dict[str, Any]]:
    """Quantized and exported models beside their sources: format, size, what it costs, how fast each runtime writes."""
    speeds: dict[str, dict[str, Any]] = {}
    for stage in run.of_kind("evaluate"):
        speeds.update(stage.metrics.get("runtimes", {}))
    for stage in run.of_kind("quantize", "export"):
        if not stage.metrics:
            continue
        speed = speeds.get(stage.name, {})
        yield {
            "name": stage.name,
            "format": stage.metrics.get("format") or f"{stage.metrics['bits']} bits",
            "provenance": stage.provenance,
            "size_bytes": stage.size_bytes,
            **{key: stage.metrics.get(key) for key in ("bits_per_weight", "perplexity_ratio", "kl", "top1_agreement")},
            **{key: speed.get(key) for key in ("runtime", "tokens_per_s", "j_per_token", "memory_bytes")},
        }


def samples(run: RunFacts) -> list[dict[str, Any]]:
    """Generated text, grouped by prompt: [{prompt, texts: [(model, continuation)]}]."""
    grouped: dict[str, list[tuple[str, str]]] = {}
    for stage in run.of_kind("evaluate"):
        for model, texts in stage.metrics.get("samples", {}).items():
            for sample in texts:
                text = re.sub(r"\n\s*\n", "\n\n", sample["text"].removeprefix(sample["prompt"]))
                grouped.setdefault(sample["prompt"], []).append((model, text))
    return [{"prompt": prompt, "texts": texts} for prompt, texts in grouped.items()]


def metric_rows(stage: StageFacts) -> list[tuple[str, str, str | None]]:
    """(metric, value, provenance) of what fits a table cell."""
    return [
        (key, show(value), stage.provenance.get(key))
        for key, value in stage.metrics.items()
        if not isinstance(value, (dict, list))
    ]
