"""What a format costs in loss: published and own measurements of perplexity, never a guess.

hpc/plan/quantization_cost.csv has one row for each measurement: model (any spelling that hpc/plan/catalogue.py reads),
format (a name of hpc/plan/inference/formats.py), bits_per_weight, ppl_ratio (quantized / unquantized), against (what it
was compared with), text, source, measured_by, note. `bench shrink` writes the same columns.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.errors import DataError
from hpc.plan.catalogue import plain_name

PUBLISHED = Path(__file__).parent.parent / "quantization_cost.csv"
NEEDED = ("model", "format", "ppl_ratio", "source", "measured_by")


@dataclass(frozen=True)
class Cost:
    """One measurement."""

    model: str
    format: str
    ppl_ratio: float
    """Perplexity of the quantized model / that of the unquantized one, on one text."""
    source: str
    measured_by: str
    bits_per_weight: float | None = None
    against: str = ""
    text: str = ""
    note: str = ""


def read_costs(path: Path = PUBLISHED) -> list[Cost]:
    """Rows of a file. Raises DataError that names the line which cannot be read."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): it has to be a CSV file like {PUBLISHED.name}") from None
    return [_cost(path, number, row) for number, row in enumerate(rows, start=2)]


def _cost(path: Path, number: int, row: dict[str, str]) -> Cost:
    missing = [key for key in NEEDED if not row.get(key)]
    if missing:
        raise DataError(f"{path}:{number}: no {missing[0]}: rows need {', '.join(NEEDED)}")
    try:
        ratio, bits = float(row["ppl_ratio"]), float(row.get("bits_per_weight") or 0) or None
        if not 0 < ratio < 1e6:
            raise ValueError
    except ValueError:
        raise DataError(f"{path}:{number}: ppl_ratio and bits_per_weight have to be numbers above 0") from None
    rest = {key: row.get(key) or "" for key in ("against", "text", "note")}
    return Cost(row["model"], row["format"], ratio, row["source"], row["measured_by"], bits, **rest)


def of(costs: Iterable[Cost], model: str, form: str) -> list[Cost]:
    """The measurements of a model in a format; owner/name is known by its name."""
    wanted = _plain(model)
    return [cost for cost in costs if cost.format == form and _plain(cost.model) == wanted]


def _plain(model: str) -> str:
    return plain_name(model.rstrip("/").split("/")[-1])


def measured_in_run(run: Path, stage: str) -> list[Cost]:
    """What the evaluate stages of a run measured of what was made of a stage's model, with the same text for both."""
    receipts = {path.parent.name: _receipt(path) for path in sorted(run.glob("stages/*/receipt.json"))}
    made = {name: _format(receipt) for name, receipt in receipts.items() if stage in receipt.get("inputs", {})}
    found: list[Cost] = []
    for judge, receipt in receipts.items():
        table = receipt.get("metrics", {}).get("models", {}) if receipt.get("kind") == "evaluate" else {}
        for name, form in made.items():
            if form is not None and name in table and stage in table:
                found += _compare(run, judge, stage, form, table[stage], table[name])
    return found


def _compare(run: Path, judge: str, stage: str, form: str, source: Any, made: Any) -> Iterator[Cost]:
    for text, before in source.items():
        if text in made:
            ratio = made[text]["perplexity"] / before["perplexity"]
            yield Cost(stage, form, ratio, str(run / "stages" / judge), "this run", None, "its source", text)


def _format(receipt: dict[str, Any]) -> str | None:
    config = receipt.get("config", {})
    if receipt.get("kind") not in ("quantize", "export"):
        return None
    return str(config["format"]) if config.get("format") else f"int{config['bits']}" if config.get("bits") else None


def _receipt(path: Path) -> dict[str, Any]:
    """Its content; empty where it is damaged, which other verbs tell."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}
