"""The step-time model against published runs: predicted and measured, row by row, with the median error.

Three figures say how good it is. In sample: constants fitted on all rows. Leave one source out: each source predicted
with constants that never saw it, which is what a row of yours should expect. Leave one hardware out: the same for each
accelerator. Constants are read from hpc/plan/step_time.json, so this takes a moment; `fit` writes that file.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from hpc.bench.plan_rows import PUBLISHED, Row, predicted, read
from hpc.errors import ConfigError
from hpc.plan.constants import Constants, constants, fitted
from hpc.plan.step_time import StepTime, step_time

WORST = 12
KEYS = ("hardware", "gpus", "model", "precision", "seq", "gbs", "mbs", "tp", "pp", "vp", "cp", "ep", "fsdp_or_dp",
        "recompute", "metric", "value", "source", "note", "read")  # fmt: skip


def score(path: Path | None = None) -> dict[str, Any]:
    """Errors of the rows of a CSV, of published.csv by default. Errors are |predicted - measured| / measured."""
    rows = read(path or PUBLISHED)
    told = [_told(row, constants()) for row in rows]
    scored = [line for line in told if line["error"] is not None]
    if not scored:
        why = told[0]["reason"] if told else "it has no rows"
        raise ConfigError(f"{path or PUBLISHED}: no row can be scored: {why}")
    found: dict[str, Any] = {
        "median_error": median(line["error"] for line in scored),
        "mean": fmean(line["error"] for line in scored),
        "scored": len(scored),
        "not_scored": len(told) - len(scored),
        "by_source": _groups(scored, "origin"),
        "by_hardware": _groups(scored, "accelerator"),
        "by_kind": _groups(scored, "kind"),
        "rows": told,
    }
    if path is None:
        for name, key, of in (
            ("source", "by_source", lambda row: row.source),
            ("hardware", "by_hardware", lambda row: row.accelerator.name),
        ):
            found[f"leave_one_{name}_out"] = _left_out(rows, fitted()[f"without_{name}"], of, found[key])
    return found


def _told(row: Row, c: Constants) -> dict[str, Any]:
    """One row for people and programs: its cells, and the prediction in the cell's own unit."""
    line: dict[str, Any] = {key: row.cells.get(key, "") for key in KEYS}
    line |= {"origin": row.source, "predicted": None, "measured": None, "error": None, "parts": {}}
    line |= {"assumed": list(row.assumed), "reason": row.reason, "accelerator": None, "kind": None}
    if row.accelerator is None or row.measured is None:
        return line
    seconds = _seconds(row, c)
    value = predicted(row, seconds.seconds)
    error = abs(value / row.measured - 1)
    return line | {
        "predicted": value / row.unit,
        "measured": row.measured / row.unit,
        "error": error,
        "parts": {name: part / seconds.seconds for name, part in seconds.parts.items() if part},
        "accelerator": row.accelerator.name,
        "kind": "MoE" if row.shape and row.shape.moe_layers else "dense",
        "reason": _likely(row, seconds, error),
    }


def _seconds(row: Row, c: Constants) -> StepTime:
    assert row.shape is not None
    assert row.layout is not None
    assert row.accelerator is not None
    return step_time(row.shape, row.layout, row.accelerator, c)


def _error(row: Row, c: Constants) -> float:
    assert row.measured is not None
    return abs(predicted(row, _seconds(row, c).seconds) / row.measured - 1)


def _groups(scored: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Rows and median error of each source or accelerator, the largest first."""
    errors: dict[str, list[float]] = defaultdict(list)
    for line in scored:
        errors[line[key]].append(line["error"])
    order = sorted(errors, key=lambda name: (-len(errors[name]), name))
    return {name: {"rows": len(errors[name]), "median_error": median(errors[name])} for name in order}


def _left_out(
    rows: Sequence[Row], values: dict[str, Any], of: Callable[[Any], str], groups: dict[str, dict[str, Any]]
) -> float | None:
    """Median error with constants that did not see a row's group; None when step_time.json is older than the rows."""
    errors: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.reason is None:
            if of(row) not in values:
                return None
            errors[of(row)].append(_error(row, constants(values[of(row)])))
    for name, found in errors.items():
        groups[name]["left_out"] = median(found)
    return median(error for found in errors.values() for error in found)


def _likely(row: Row, seconds: StepTime, error: float) -> str | None:
    """What a large error may come from, as far as the row tells."""
    if error < 0.25:
        return None
    if any(name in row.assumed for name in ("gbs", "mbs", "seq")):
        return f"not stated: {', '.join(row.assumed)}"
    parts = {name: part for name, part in seconds.parts.items() if name not in ("products", "attention")}
    name = max(parts, key=lambda part: parts[part])
    share = parts[name] / seconds.seconds
    meaning = {
        "host": "kernel starts: CUDA graphs and fused kernels are not in a row",
        "expert parallel": "all-to-all: the dispatcher is not in a row",
        "experts": "grouped products: their kernels differ by release",
        "memory": "element-wise work: fusion is not in a row",
        "data parallel": "gradients: what hides them is not in a row",
        "recompute": "recomputed layers: how many is not in a row",
        "bubble": "pipeline schedule",
    }
    return f"{share:.0%} of it {meaning[name]}" if share >= 0.2 and name in meaning else "software or clock"


def show(found: dict[str, Any]) -> str:
    """The table for people: by source, by hardware, the worst rows, the rows that cannot be scored."""
    lines = [f"{'source':<40} {'rows':>5} {'median error':>13} {'not seen in the fit':>20}"]
    for title, key in (("", "by_source"), ("hardware", "by_hardware"), ("kind", "by_kind")):
        lines += ["", f"{title:<40} {'rows':>5} {'median error':>13} {'not seen in the fit':>20}"] if title else []
        for name, group in found[key].items():
            unseen = f"{group['left_out']:.1%}" if "left_out" in group else "-"
            lines.append(f"{name:<40} {group['rows']:>5} {group['median_error']:>13.1%} {unseen:>20}")
    scored = sorted((line for line in found["rows"] if line["error"] is not None), key=lambda line: -line["error"])
    lines += ["", f"worst of {found['scored']} rows"]
    for line in scored[:WORST]:
        ratio = line["predicted"] / line["measured"]
        what = f"{line['hardware']} x {line['gpus'] or '?'} {line['model']} {line['precision']}"
        lines.append(f"  predicted / measured {ratio:4.2f}  {what:<52} {line['reason'] or ''}")
    if found["not_scored"]:
        lines += ["", f"{found['not_scored']} rows cannot be scored"]
        for line in found["rows"]:
            if line["error"] is None:
                lines.append(f"  {line['hardware']} {line['model']}: {line['reason']}")
    out = [
        f"leave one {name} out {found[f'leave_one_{name}_out']:.1%}"
        for name in ("source", "hardware")
        if found.get(f"leave_one_{name}_out") is not None
    ]
    summary = f"median error {found['median_error']:.1%}, mean {found['mean']:.1%}"
    return "\n".join([*lines, "", ", ".join([summary, *out])])
