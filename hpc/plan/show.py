"""Plans and quantities for people: a table that fits a terminal, and units that fit a line."""

from hpc.plan.plan import Plan, Quantity, StagePlan

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
    return "\n".join([f"plan of {plan.run}", "", *lines, "", *notes, *overlays, "", *plan.assumptions])


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


def amount(value: float | None) -> str:
    """9.4M, 1.2T; a dash for None."""
    if value is None:
        return "-"
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


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
