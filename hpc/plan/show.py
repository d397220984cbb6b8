"""Plans and quantities for people: a table that fits a terminal, and units that fit a line."""

from hpc.energy.footprint import Footprint
from hpc.plan.layouts import Layout, Search
from hpc.plan.plan import Plan, StagePlan
from hpc.plan.quantity import GIB, Quantity, amount

HEADINGS = (
    "stage",
    "kind",
    "ranks",
    "EP",
    "ZeRO",
    "steps",
    "tokens",
    "total",
    "active",
    "trained",
    "GiB/rank",
    "FLOPs",
    "time",
    "energy",
)


def render(plan: Plan) -> str:
    """The table of stages, the sum, and what the figures rest on. A dash means: not known, or not applicable."""
    rows = [HEADINGS, *(_row(stage) for stage in plan.stages)]
    rows.append(("total", *[""] * 11, duration(plan.total_time.value), energy(plan.total_energy.value)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [_line(rows[0], widths), "-" * (sum(widths) + 2 * (len(widths) - 1)), *(_line(r, widths) for r in rows[1:])]
    notes = [f"{stage.name}: {note}" for stage in plan.stages for note in stage.notes]
    overlays = [f"{s.name}: DeepSpeed overlay {dict(s.deepspeed_overlay)}" for s in plan.stages if s.deepspeed_overlay]
    told = [*plan.assumptions, *_footprint(plan.footprint)]
    return "\n".join([f"plan of {plan.run}", "", *lines, "", *notes, *_failures(plan), *overlays, "", *told])


def _failures(plan: Plan) -> list[str]:
    """Of stages on nodes whose failures the site states."""
    return [
        f"{stage.name}: {found.expected:.2g} failures of nodes expected, goodput {found.goodput:.1%} with checkpoints "
        f"every {duration(found.interval_s)}; best: every {duration(found.best_interval_s)} (estimated)"
        for stage in plan.stages
        if (found := stage.failures) is not None
    ]


def _footprint(found: Footprint | None) -> list[str]:
    """What the facility adds, as far as the site states it."""
    if found is None:
        return []
    parts = [
        (found.total_kwh, "kWh with the facility (PUE)"),
        (found.water_l, "l of water"),
        (found.carbon_kg, "kg CO2e"),
        (found.embodied_kg, "kg CO2e embodied"),
    ]
    known = [f"{value:.3g} {unit}" for value, unit in parts if value is not None]
    return [f"footprint: derived from the energy and the site's statements: {', '.join(known)}"] if known else []


SEARCH_HEADINGS = (
    "nodes", "ranks", "ZeRO", "EP", "micro-batch", "recompute", "GiB/rank", "time", "energy", "node-hours",
)  # fmt: skip
SHOWN = 12


def render_search(found: Search) -> str:
    """The best layouts, how to have the first one, and why others are not there."""
    rows = [SEARCH_HEADINGS, *(_search_row(layout) for layout in found.fitting[:SHOWN])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(SEARCH_HEADINGS))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines = [f"{found.stage}: {len(found.fitting):,} of {found.tried:,} layouts fit, by {found.by} (estimated)", ""]
    if found.fitting:
        words = " ".join(f"--set {word}" for word in found.fitting[0].overrides(found.stage))
        lines += [table[0], "-" * len(table[0]), *table[1:], "", "the first one:", f"  {words}", ""]
    if found.refused:
        lines += ["not among them:", *(f"  {line}" for line in found.refused)]
    return "\n".join(lines).rstrip()


def _search_row(layout: Layout) -> tuple[str, ...]:
    return (
        str(layout.nodes),
        str(layout.nodes * layout.ranks_per_node),
        str(layout.zero_stage),
        str(layout.expert_parallel_size),
        str(layout.micro_batch_size),
        layout.recompute,
        f"{layout.memory_bytes / GIB:.2f}",
        duration(layout.seconds),
        energy(layout.energy_j),
        f"{layout.seconds * layout.nodes / 3600:,.3g}",
    )


def _row(stage: StagePlan) -> tuple[str, ...]:
    ranks = str(stage.ranks_per_node) if stage.nodes == 1 else f"{stage.nodes}x{stage.ranks_per_node}"
    trains = stage.steps is not None
    return (
        stage.name,
        stage.kind,
        ranks,
        str(stage.expert_parallel_size) if trains else "-",
        str(stage.zero_stage) if trains else "-",
        "-" if stage.steps is None else f"{stage.steps:,}",
        amount(stage.tokens),
        amount(stage.total_params),
        amount(stage.active_params),
        amount(stage.trainable_params),
        _gib(stage.memory_per_rank),
        amount(stage.flops.value or None),
        duration(stage.time.value),
        energy(stage.energy.value),
    )


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = [c.ljust(w) if n < 2 else c.rjust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join(padded).rstrip()


def _gib(quantity: Quantity) -> str:
    return "-" if quantity.value is None else f"{quantity.value / 2**30:.2f}"


def duration(seconds: float | None) -> str:
    """9.4 s, 3m20s, 2h05m, 3d04h; a dash for None."""
    if seconds is None:
        return "-"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours < 48 else f"{hours // 24}d{hours % 24:02}h"


def energy(joules: float | None) -> str:
    """4.1 Wh, 2.3 kWh; a dash for None."""
    if joules is None:
        return "-"
    watt_hours = joules / 3600
    for size, unit in ((1e6, "MWh"), (1e3, "kWh")):
        if watt_hours >= size:
            return f"{watt_hours / size:.3g} {unit}"
    return f"{watt_hours:.3g} Wh"
