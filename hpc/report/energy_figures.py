"""Figures of energy: power of the nodes over time, useful and lost joules, goodput."""

from collections.abc import Mapping, Sequence
from typing import Any

from hpc.energy.goodput import PARTS
from hpc.report.facts import StageFacts
from hpc.report.figures import Figure, digits, energy_unit, finish, series_colour
from hpc.report.series import Clock, evenly

LINES_OF_NODES = 8
"""Above this many nodes power is drawn as a heat map, a row for each node."""
ROWS_OF_NODES = 64
COLUMNS_OF_POWER = 300


def power(stages: Sequence[StageFacts]) -> Figure | None:
    """Watts of each node over time, a band for each attempt; long pauses are cut out of the axis."""
    spans = [(a.start, a.end) for stage in stages for a in stage.attempts]
    spans += [(node.times[0], node.times[-1]) for stage in stages for node in stage.power]
    hosts = sorted({node.host for stage in stages for node in stage.power})
    if not hosts:
        return None
    clock = Clock(spans)
    drawn = _power_lines if len(hosts) <= LINES_OF_NODES else _power_rows
    shapes, notes = _bands(stages, clock)
    return finish(
        drawn(stages, hosts, clock), "minutes, without long pauses" if clock.cuts else "minutes", "W per node"
        if len(hosts) <= LINES_OF_NODES else "", height=360, legend=1 < len(hosts) <= LINES_OF_NODES, shapes=shapes,
        annotations=notes, yaxis={"rangemode": "tozero"} if len(hosts) <= LINES_OF_NODES else {},
        xaxis={"range": [0, clock.length]}, legend_y=1.13, margin={"t": 44},
    )  # fmt: skip


def _power_lines(stages: Sequence[StageFacts], hosts: Sequence[str], clock: Clock) -> list[dict[str, Any]]:
    data = []
    for number, host in enumerate(hosts):
        xs: list[float | None] = []
        ys: list[float | None] = []
        for node in (node for stage in stages for node in stage.power if node.host == host):
            xs += [*(digits(clock.minutes(time), 6) for time in node.times), None]
            ys += [*(digits(watts) for watts in node.watts), None]
        data.append(
            {"type": "scatter", "mode": "lines", "name": host, "x": xs, "y": ys, "connectgaps": False,
             "line": {"color": series_colour(number), "width": 1.4}}
        )  # fmt: skip
    return data


def _power_rows(stages: Sequence[StageFacts], hosts: Sequence[str], clock: Clock) -> list[dict[str, Any]]:
    shown = evenly(hosts, ROWS_OF_NODES)
    width = clock.length / COLUMNS_OF_POWER or 1.0
    z: list[list[float | None]] = [[None] * COLUMNS_OF_POWER for _ in shown]
    for node in (node for stage in stages for node in stage.power if node.host in shown):
        row = z[shown.index(node.host)]
        half = max(node.span_s, 1.0) / 120
        for time, watts in zip(node.times, node.watts, strict=True):
            middle = clock.minutes(time)
            first, last = max(0, int((middle - half) / width)), min(COLUMNS_OF_POWER - 1, int((middle + half) / width))
            row[first : last + 1] = [digits(watts, 4)] * (last + 1 - first)
    return [
        {"type": "heatmap", "z": z, "y": list(shown), "x0": width / 2, "dx": digits(width, 6), "colorscale": "@power",
         "colorbar": {"thickness": 10, "title": {"text": "W", "font": {"size": 11}}, "outlinewidth": 0},
         "hovertemplate": "%{y}, minute %{x:.1f}: %{z} W<extra></extra>"}
    ]  # fmt: skip


def _bands(stages: Sequence[StageFacts], clock: Clock) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A strip above the figure for each attempt, a pale band below it, and a line where a pause was cut out."""
    shapes: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for stage in stages:
        for attempt in stage.attempts:
            x0, x1 = clock.minutes(attempt.start), clock.minutes(attempt.end)
            ok = attempt.outcome in ("done", "running", "stopped")
            colour = f"@{stage.kind}" if ok else "@bad"
            band = {"type": "rect", "xref": "x", "yref": "paper", "x0": digits(x0, 6), "x1": digits(x1, 6),
                    "line": {"width": 0}, "fillcolor": colour, "layer": "below"}  # fmt: skip
            shapes += [{**band, "y0": 0, "y1": 1, "opacity": 0.10}, {**band, "y0": 1.01, "y1": 1.04, "opacity": 0.9}]
            share = (x1 - x0) / clock.length if clock.length else 0
            many = len(stage.attempts) > 1
            label = f"{stage.name} · {attempt.number}" if many else stage.name
            if not ok:
                label += f" ✗ {attempt.outcome}"
            if share > 0:  # the page leaves out what does not fit its width
                notes.append(
                    {"name": f"share:{share:.4f}", "xref": "x", "yref": "paper", "x": digits((x0 + x1) / 2, 6),
                     "y": 1.04, "yanchor": "bottom", "text": label, "showarrow": False,
                     "font": {"size": 11, "color": colour}}
                )  # fmt: skip
    for minutes, seconds in clock.cuts:
        shapes.append(
            {"type": "line", "xref": "x", "yref": "paper", "x0": digits(minutes, 6), "x1": digits(minutes, 6),
             "y0": 0, "y1": 1, "line": {"color": "@soft", "dash": "dot", "width": 1}}
        )  # fmt: skip
        hours = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
        notes.append(
            {"xref": "x", "yref": "paper", "x": digits(minutes, 6), "y": 0.02, "yanchor": "bottom", "textangle": -90,
             "text": f"{hours} cut out", "showarrow": False, "font": {"size": 10, "color": "@soft"}, "xanchor": "left"}
        )  # fmt: skip
    return shapes, notes


def energy_bars(useful: Mapping[str, tuple[float, float]], kinds: Mapping[str, str]) -> Figure | None:
    """Energy of each stage, watt-hours or kWh: what stayed and what was lost. useful: name -> (useful J, lost J)."""
    if not useful:
        return None
    names = list(useful)[::-1]
    biggest = max(sum(pair) for pair in useful.values())
    unit, joules = energy_unit(biggest)
    data: list[dict[str, Any]] = [
        {"type": "bar", "orientation": "h", "name": "useful", "y": names, "showlegend": False,
         "x": [digits(useful[name][0] / joules) for name in names],
         "marker": {"color": [f"@{kinds.get(name, 'soft')}" for name in names]},
         "hovertemplate": f"%{{y}}: %{{x}} {unit} useful<extra></extra>"},
    ]  # fmt: skip
    if any(lost for _, lost in useful.values()):
        data.append(
            {"type": "bar", "orientation": "h", "name": "lost", "y": names, "marker": {"color": "@bad"},
             "x": [digits(useful[name][1] / joules) for name in names],
             "hovertemplate": f"%{{y}}: %{{x}} {unit} lost<extra></extra>"}
        )  # fmt: skip
    notes = [
        {"x": sum(useful[name]) / joules, "y": name, "text": f" {sum(useful[name]) / joules:.3g}", "showarrow": False,
         "xanchor": "left", "font": {"size": 11}}
        for name in names
    ]  # fmt: skip
    return finish(
        data, f"energy, {unit}", "", height=90 + 26 * len(names), legend=len(data) > 1, barmode="stack",
        annotations=notes, xaxis={"range": [0, 1.22 * biggest / joules or 1]},
    )  # fmt: skip


def goodput_bars(rows: Mapping[str, Mapping[str, float]], units: Mapping[str, str]) -> Figure | None:
    """Where time and energy went, each bar one whole: name -> part -> amount. units: name -> unit of its amounts."""
    rows = {name: parts for name, parts in rows.items() if sum(parts.values()) > 0}
    if not rows:
        return None
    names = list(rows)[::-1]
    data = []
    for part in PARTS:
        shares = [rows[name].get(part, 0.0) / sum(rows[name].values()) for name in names]
        if not any(shares):
            continue
        data.append(
            {
                "type": "bar", "orientation": "h", "name": part, "y": names, "x": [digits(100 * s) for s in shares],
                "marker": {"color": f"@part-{part}"}, "textposition": "inside", "insidetextanchor": "middle",
                "text": [f"{100 * share:.0f} %" if share >= 0.05 else "" for share in shares], "textangle": 0,
                "insidetextfont": {"color": f"@on-{part}"},
                "customdata": [f"{rows[name].get(part, 0.0):,.4g} {units[name]}" for name in names],
                "hovertemplate": f"{part}: %{{customdata}}, %{{x:.1f}} %<extra></extra>",
            }
        )  # fmt: skip
    return finish(
        data, "% of the whole", "", height=130 + 34 * len(names), barmode="stack", bargap=0.35,
        xaxis={"range": [0, 100]}, yaxis={"ticksuffix": " "}, uniformtext={"minsize": 10, "mode": "hide"},
    )  # fmt: skip
