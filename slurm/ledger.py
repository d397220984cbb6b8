"""`launch.py ledger`: every joule of a run as a table or JSON, beside what Slurm's accounting counted."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpc.config import Facility
from hpc.energy.footprint import Footprint, footprint
from hpc.energy.goodput import Goodput, run_goodput
from hpc.energy.ledger import GAP_S, NodeEnergy, Reconciled, RunLedger, StageLedger, run_ledger, run_stages
from hpc.energy.reconcile import scope_joules, with_wandb
from hpc.errors import SiteError
from hpc.plan.show import duration, energy
from hpc.run.directory import RunDirectory, StageDirectory, read_jsonl
from hpc.tracking.wandb import gpu_energy_j
from slurm import commands

LONGEST_REASON = 120
SACCT_NOTE = (
    "whole nodes while srun's steps run, a sample every few seconds; ours are counted from a sampler's start to its end"
)


def look(run: RunDirectory) -> RunLedger:
    """The ledger of a run, reconciled with W&B's GPU counters where it has GPUs, and with sacct where the run was
    submitted to a Slurm that answers here."""
    ledger = with_gpus(run, run_ledger(run.root))
    jobs = [job for row in read_jsonl(run.submissions) if row["event"] == "submit" for job in row["jobs"]]
    if not jobs:
        return ledger
    try:
        told = commands.consumed_energy(jobs)
    except SiteError:
        told = {}
    return replace(ledger, reconciled=(*ledger.reconciled, with_sacct(run, ledger, told)))


def with_gpus(run: RunDirectory, ledger: RunLedger) -> RunLedger:
    """W&B's monitor beside our GPU counters, on the nodes that it watches: the first of each attempt."""
    watched: list[NodeEnergy] = []
    for root, stage in zip(run_stages(run.root), ledger.stages, strict=True):
        starts = [row for row in read_jsonl(StageDirectory(root).attempts) if row.get("event") == "start"]
        first = {row["attempt"]: row["nodes"][0] for row in starts if row["nodes"]}
        watched += [node for node in stage.nodes if first.get(node.attempt, node.host) == node.host]
    if scope_joules(watched, "gpu") is None:
        return ledger
    told = [joules for root in run_stages(run.root) if (joules := gpu_energy_j(root)) is not None]
    return replace(ledger, reconciled=(*ledger.reconciled, with_wandb(watched, sum(told) if told else None)))


def with_sacct(run: RunDirectory, ledger: RunLedger, told: Mapping[str, Sequence[float | None]]) -> Reconciled:
    """Slurm's figure beside ours, over those attempts that Slurm has a figure of. told: job -> joules by restart."""
    theirs, ours, without = [], [], 0
    for root, stage in zip(run_stages(run.root), ledger.stages, strict=True):
        for row in read_jsonl(StageDirectory(root).attempts):
            mine = [node.energy_j for node in stage.nodes if node.attempt == row.get("attempt")]
            if row.get("event") != "start" or not row["job"] or not mine:
                continue
            records = told.get(row["job"], [])
            joules = records[row["restart"]] if row["restart"] < len(records) else None
            without += joules is None
            if joules is not None:
                theirs.append(joules)
                ours += [own for own in mine if own is not None]
    if not theirs:
        return Reconciled("sacct", None, None, "it has no energy here: Slurm's AcctGatherEnergyType is not set")
    lacks = f"; {without} attempts without a figure are left out on both sides: Slurm drops what was requeued or lost"
    return Reconciled("sacct", sum(theirs), sum(ours), SACCT_NOTE + (lacks if without else ""))


def to_json(run: RunDirectory, ledger: RunLedger) -> dict[str, Any]:
    """Everything as plain data; joules and seconds."""
    goodput, place = run_goodput(run.root), site_footprint(run, ledger)
    totals = ("energy_j", "useful_j", "lost_j", "node_s", "missing", "is_complete", "inherited_j")
    return {
        **asdict(ledger),
        **{name: getattr(ledger, name) for name in totals},
        "reconciled": [{**asdict(one), "difference_j": one.difference_j} for one in ledger.reconciled],
        "goodput": None if goodput is None else {**asdict(goodput), "goodput": goodput.goodput},
        "footprint": None if place is None else asdict(place),
    }


def site_footprint(run: RunDirectory, ledger: RunLedger) -> Footprint | None:
    """What follows from the site's statements about its building; None where it states nothing."""
    tasks = [StageDirectory(path).task for path in sorted((run.root / "stages").glob("*"))]
    stated = [json.loads(path.read_text(encoding="utf-8")).get("facility") for path in tasks if path.exists()]
    facility = Facility.model_validate(next(filter(None, reversed(stated)), {}))
    if ledger.energy_j is None or not facility.stated():
        return None
    return footprint(ledger.energy_j, ledger.node_s / 3600, facility)


def show(run: RunDirectory, ledger: RunLedger, console: Console | None = None) -> None:
    """Print the ledger for a person."""
    console = console or Console(highlight=False, soft_wrap=False, width=None if Console().is_terminal else 160)
    console.print(_table(ledger))
    for line in _words(run, ledger):
        console.print(line, markup=False)


def _table(ledger: RunLedger) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for heading in ("stage", "attempt", "node", "energy", "useful", "lost", "node time", "tokens", ""):
        is_text = heading in ("stage", "")
        table.add_column(heading, no_wrap=bool(heading), justify="left" if is_text else "right", overflow="fold")
    for stage in ledger.stages:
        joules = _marked((stage.energy_j, stage.useful_j, stage.lost_j), stage.provenance)
        tokens = "-" if stage.tokens is None else f"{stage.tokens:,}"
        table.add_row(stage.name, "", "", *joules, duration(stage.node_s), tokens, style="bold")
        for row in _node_rows(stage):
            table.add_row(*map(Text, row))  # words of libraries may hold what rich takes for markup
    sources = [source for stage in ledger.stages for source in stage.provenance]
    amounts = _marked((ledger.energy_j, ledger.useful_j, ledger.lost_j), sources)
    table.add_row("total", "", "", *amounts, duration(ledger.node_s), style="bold")
    return table


def _marked(joules: Iterable[float | None], sources: Iterable[str]) -> list[str]:
    """Amounts of energy, with a ~ where any of it is estimated."""
    mark = "~" if any(source.startswith("estimated") for source in sources) else ""
    return [energy(amount) if amount is None else mark + energy(amount) for amount in joules]


def _node_rows(stage: StageLedger) -> Iterator[tuple[str, ...]]:
    """One row for each node of an attempt, with what the attempt lost in its first row."""
    told: set[int] = set()
    for node in stage.nodes:
        lost = [work for work in stage.lost if work.attempt == node.attempt and node.attempt not in told]
        told.add(node.attempt)
        words = "; ".join(_lost_words(work.kind, work.energy_j, work.steps, work.reason) for work in lost)
        end = "" if node.complete else "no end line"
        yield ("", str(node.attempt), node.host, energy(node.energy_j), "", "", duration(node.end - node.start), "",
               "; ".join(word for word in (words, end) if word))  # fmt: skip


def _lost_words(kind: str, joules: float | None, steps: int | None, reason: str) -> str:
    count = f" ({steps} steps)" if steps else ""
    return f"{energy(joules)} lost in {kind.replace('_', ' ')}{count}: {shorten(reason, LONGEST_REASON)}"


def _words(run: RunDirectory, ledger: RunLedger) -> Iterator[str]:
    sources = dict.fromkeys(source for stage in ledger.stages for source in stage.provenance)
    yield from (("~ " if source.startswith("estimated") else "") + source for source in sources)
    if ledger.missing:
        yield "INCOMPLETE: what was drawn is at least the total above; missing:"
        yield from (f"  {words}" for words in ledger.missing)
    else:
        yield f"complete: every node of every attempt reported, to within {GAP_S:.0f} s of its end"
    notes = dict.fromkeys(note for stage in ledger.stages for node in stage.nodes for note in node.notes)
    yield from (f"note: {note}" for note in notes)
    goodput = run_goodput(run.root)
    if goodput is not None:
        yield _goodput_words(goodput)
    place = site_footprint(run, ledger)
    if place is not None:
        figures = [f"{name} {value:.4g}" for name, value in asdict(place).items() if isinstance(value, float)]
        yield "footprint, derived from what the site states: " + ", ".join(figures)
    for one in ledger.inherited:
        yield f"inherited: {energy(one.energy_j)} of {one.stage} in {one.run} ({one.reason})"
    for source in ledger.reconciled:
        if source.difference_j is None or not source.ours_j:
            yield f"{source.name}: {source.note}"
            continue
        part = source.difference_j / source.ours_j
        yield (
            f"{source.name}: {energy(source.theirs_j)} beside our {energy(source.ours_j)}, {part:+.1%} ({source.note})"
        )


def _goodput_words(goodput: Goodput) -> str:
    parts = [
        f"{part} {duration(seconds)}" + (f" / {energy(goodput.energy_j[part])}" if goodput.energy_j[part] else "")
        for part, seconds in goodput.seconds.items()
        if seconds > 0
    ]
    return f"goodput {goodput.goodput:.0%} of {duration(goodput.wall_s)}: {', '.join(parts)}"
