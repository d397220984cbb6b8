"""Several runs side by side on one page: what differs in their configuration, what came out, what it cost."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.errors import ConfigError
from hpc.report import account, energy_figures, figures, words
from hpc.report.facts import TRAINED, RunFacts
from hpc.report.figures import Figure
from hpc.report.page import embed, environment, plotly_script, publish
from hpc.report.series import POINTS

UNSAID = {"name", "run_root"}
"""Keys of a configuration that differ between any two runs."""
LONGEST_VALUE = 60


@dataclass(frozen=True)
class Cell:
    """A figure of one run."""

    text: str
    provenance: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """A figure of every run."""

    name: str
    cells: list[Cell]


def write_comparison(runs: Sequence[RunFacts], path: Path) -> None:
    """Write the page: whole or not at all. Raises ConfigError for fewer than two runs, StorageError."""
    if len(runs) < 2:
        raise ConfigError("a comparison needs two runs or more")
    labels = names(runs)
    page = environment().get_template("compare.html.j2").render(
        title=f"{' · '.join(labels)} · GreenMoE comparison",
        runs=list(zip(labels, runs, strict=True)),
        words=words,
        points=POINTS,
        differences=differences(runs),
        quality=quality(runs),
        cost=cost(runs),
        figures=embed(draw(labels, runs)),
        plotly=plotly_script(),
    )  # fmt: skip
    publish(path, page)


def names(runs: Sequence[RunFacts]) -> list[str]:
    """What each run is called here: its name, with its folder where two have the same."""
    plain = [run.name for run in runs]
    told = [name if plain.count(name) == 1 else f"{name} ({Path(run.root).parent.name})"
            for name, run in zip(plain, runs, strict=True)]  # fmt: skip
    return [name if told.count(name) == 1 else f"{name} {number}" for number, name in enumerate(told, 1)]


def differences(runs: Sequence[RunFacts]) -> list[Row]:
    """Keys of the configuration whose values are not the same in all runs; a dash where a run lacks the key, and one
    row for a stage that not all of them have."""
    shared = set.intersection(*({stage["name"] for stage in run.config["stages"]} for run in runs))
    flat = [flatten(run.config, shared) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one if key.split(".")[0] not in UNSAID)
    rows = [Row(key, [Cell(short(one[key]) if key in one else words.DASH) for one in flat]) for key in keys
            if len({one.get(key) for one in flat}) > 1]  # fmt: skip
    machines = [run.machine or words.DASH for run in runs]
    return rows + ([Row("nodes", [Cell(machine) for machine in machines])] if len(set(machines)) > 1 else [])


def flatten(config: Mapping[str, Any], shared: Collection[str]) -> dict[str, str]:
    """Dotted keys -> values as JSON. Stages go by their name; of those that are not shared only the kind is told."""
    found = dict(_flat({key: value for key, value in config.items() if key != "stages"}, ""))
    for stage in config["stages"]:
        place = f"stages.{stage['name']}"
        if stage["name"] in shared:
            found.update(_flat({key: value for key, value in stage.items() if key != "name"}, f"{place}."))
        else:
            found[place] = stage["kind"]
    return found


def _flat(config: Mapping[str, Any], above: str) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, json.dumps(value)


def short(value: str) -> str:
    """A JSON value that fits a cell."""
    plain = value.strip('"')
    return plain if len(plain) <= LONGEST_VALUE else plain[: LONGEST_VALUE - 1] + "…"


def best(values: Sequence[float | None], show: Any, provenance: Sequence[str] = ()) -> list[Cell]:
    """Cells where the smallest value is marked, if they differ."""
    known = [value for value in values if value is not None]
    sources = provenance or [""] * len(values)
    differ = bool(known) and min(known) < max(known)
    return [
        Cell(show(value), source if value is not None else "", differ and value == min(known))
        for value, source in zip(values, sources, strict=True)
    ]


def bounded(values: Sequence[float | None], show: Any, provenance: Sequence[str], whole: Sequence[bool]) -> list[Cell]:
    """`best` of figures that follow from joules: of a run whose nodes did not all report they are lower bounds, and
    then none of them is called the smallest."""
    cells = best(values, show, provenance)
    return [
        Cell(cell.text if complete or value is None else f"≥ {cell.text}", cell.provenance, cell.is_best and all(whole))
        for cell, value, complete in zip(cells, values, whole, strict=True)
    ]


def quality(runs: Sequence[RunFacts]) -> list[Row]:
    """Held-out perplexity of every model on every token set, and of the training's last figures."""
    found: dict[tuple[str, str], list[float | None]] = {}
    for number, run in enumerate(runs):
        for table in run.evaluations():
            for model, row in table.items():
                for token_set, told in row.items():
                    cells = found.setdefault((model, token_set), [None] * len(runs))
                    cells[number] = told["perplexity"]
    trained = [next((s for s in run.of_kind(*TRAINED) if s.metrics), None) for run in runs]

    def figure(key: str) -> tuple[list[float | None], list[str]]:
        """A metric of each run's pretraining, and where it comes from."""
        told = [(stage.metrics.get(key), stage.provenance.get(key, "")) if stage else (None, "") for stage in trained]
        return [value for value, _ in told], [source for _, source in told]

    losses, sources = figure("heldout_loss")
    label = "held-out loss of pretraining, nats per token"
    rows = [Row(label, best(losses, lambda value: words.show(value, "{:.4f}"), sources))]
    derived = ["derived: exp of the measured held-out loss"] * len(runs)
    rows += [
        Row(f"perplexity of {model} on {token_set}", best(v, lambda value: words.show(value, "{:,.1f}"), derived))
        for (model, token_set), v in found.items()
    ]
    for key, label in (("total_params", "parameters"), ("active_params", "active per token"), ("tokens", "tokens")):
        values, sources = figure(key)
        rows.append(Row(label, [Cell(words.show(v), s) for v, s in zip(values, sources, strict=True)]))
    return [row for row in rows if any(cell.text != words.DASH for cell in row.cells)]


def cost(runs: Sequence[RunFacts]) -> list[Row]:
    """Energy (useful and lost), time, goodput and carbon."""
    sources = ["; ".join(row["source"] for row in account.sources(run)) for run in runs]
    derived = [f"derived: from the ledger; {source}" for source in sources]
    ledgers = [run.ledger for run in runs]
    walls = [words.wall_s(run) for run in runs]
    trained = [next((s for s in run.of_kind(*TRAINED) if s.metrics), None) for run in runs]
    per_token = [
        stage.energy_j / stage.metrics["tokens"]
        if stage and stage.energy_j is not None and stage.metrics.get("tokens") else None for stage in trained
    ]  # fmt: skip
    parts = [account.whole_footprint(run) for run in runs]
    whole = [run.is_complete for run in runs]
    rows = [
        Row("energy of the nodes", bounded([run.energy_j for run in runs], words.joules, sources, whole)),
        Row("of it useful", bounded([one.useful_j if one else None for one in ledgers], words.joules, derived, whole)),
        Row("of it lost", bounded([one.lost_j if one else None for one in ledgers], words.joules, derived, whole)),
        Row("pretraining, J per token", bounded(per_token, lambda v: words.show(v, "{:.3g}"), derived, whole)),
        Row("wall time", best(walls, words.seconds, ["measured: from records of attempts"] * len(runs))),
        Row("node-hours sampled", best([one.node_s / 3600 if one else None for one in ledgers],
                                       lambda v: words.show(v, "{:.4g}"), ["measured: samplers"] * len(runs))),
        Row("goodput", [Cell(f"{100 * run.goodput.goodput:.0f} %" if run.goodput else words.DASH,
                             "derived: productive time / wall time" if run.goodput else "") for run in runs]),
        Row("energy of the building", bounded([_joules(p.total_kwh) if p else None for p in parts], words.joules,
                                              ["derived: PUE of the site x energy"] * len(runs), whole)),
        Row("water", bounded([p.water_l if p else None for p in parts], _litres,
                             ["derived: WUE of the site"] * len(runs), whole)),
        Row("carbon, CO2e", bounded([account.emissions_kg(run) for run in runs], words.kilograms,
                                    ["derived: carbon intensity of the site x energy"] * len(runs), whole)),
        Row("embodied, CO2e", best([p.embodied_kg if p else None for p in parts], words.kilograms,
                                   ["derived: node-hours x the site's figure"] * len(runs))),
    ]  # fmt: skip
    complete = Row("energy complete", [Cell("yes" if one else "no: lower bounds") for one in whole])
    return [*(row for row in rows if any(cell.text != words.DASH for cell in row.cells)), complete]


def _joules(kwh: float | None) -> float | None:
    return None if kwh is None else kwh * figures.JOULES_PER_KWH


def _litres(value: float | None) -> str:
    return words.DASH if value is None else f"{value:,.3g} L"


def draw(labels: Sequence[str], runs: Sequence[RunFacts]) -> dict[str, Figure | None]:
    """Loss of all runs over each other, against tokens and against energy; energy useful and lost."""
    curves: dict[str, Sequence[Mapping[str, Any]]] = {}
    for label, run in zip(labels, runs, strict=True):
        trained = [stage for stage in run.of_kind(*TRAINED) if stage.history]
        for stage in trained:
            curves[label if len(trained) == 1 else f"{label} {stage.name}"] = stage.history
    drawn = {
        label: (run.ledger.useful_j or 0.0, run.ledger.lost_j or 0.0)
        for label, run in zip(labels, runs, strict=True) if run.ledger and run.ledger.energy_j is not None
    }  # fmt: skip
    return {
        "loss_tokens": figures.loss_curves(curves, "tokens"),
        "loss_energy": figures.loss_curves(curves, "energy"),
        "energy": energy_figures.energy_bars(drawn, dict.fromkeys(drawn, "pretrain")),
    }
