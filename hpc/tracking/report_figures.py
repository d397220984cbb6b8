"""The figures of the report: the chain as SVG, curves and bars as plotly HTML fragments without their library."""

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

COLOURS = {
    "prepare": "#6b7f94", "pretrain": "#0f766e", "lora": "#b45309", "merge": "#7c5cbf", "quantize": "#be3a5a",
    "evaluate": "#2563a8", "report": "#8a8f98",
}  # fmt: skip
SERIES = ["#0f766e", "#b45309", "#7c5cbf", "#be3a5a", "#2563a8", "#5b7f2b", "#6b7f94"]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, MARGIN = 140, 62, 36, 18, 8


def chain_svg(stages: Sequence[Any], labels: dict[str, str]) -> str:
    """The chain, left to right by depth of dependency. labels: a line of text for each stage's name."""
    depth: dict[str, int] = {}
    by_name = {stage.name: stage for stage in stages}

    def level(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((level(need) for need in by_name[name].needs if need in by_name), default=-1)
        return depth[name]

    columns: dict[int, list[str]] = {}
    for stage in stages:
        columns.setdefault(level(stage.name), []).append(stage.name)
    tallest = max(len(names) for names in columns.values())
    height = tallest * BOX_HEIGHT + (tallest - 1) * GAP_Y + 2 * MARGIN
    width = len(columns) * BOX_WIDTH + (len(columns) - 1) * GAP_X + 2 * MARGIN
    place: dict[str, tuple[float, float]] = {}
    for column, names in columns.items():
        used = len(names) * BOX_HEIGHT + (len(names) - 1) * GAP_Y
        for row, name in enumerate(names):
            x = MARGIN + column * (BOX_WIDTH + GAP_X)
            place[name] = (x, (height - used) / 2 + row * (BOX_HEIGHT + GAP_Y))
    parts = [_edge(place[need], place[stage.name]) for stage in stages for need in stage.needs if need in place]
    parts += [_box(place[stage.name], stage.name, stage.kind, labels.get(stage.name, "")) for stage in stages]
    return (
        f'<svg class="chain" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="stages of the chain and what they need">{"".join(parts)}</svg>'
    )


def _edge(source: tuple[float, float], target: tuple[float, float]) -> str:
    x1, y1 = source[0] + BOX_WIDTH, source[1] + BOX_HEIGHT / 2
    x2, y2 = target[0], target[1] + BOX_HEIGHT / 2
    bend = max(24.0, (x2 - x1) / 2)
    colour = "#c3cad3" if x2 - x1 <= GAP_X else "#e3e8ee"  # paler behind the stages it passes
    curve = f"M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"
    return f'<path d="{curve}" fill="none" stroke="{colour}" stroke-width="1.4"/>'


def _box(corner: tuple[float, float], name: str, kind: str, label: str) -> str:
    x, y = corner
    colour = COLOURS.get(kind, "#8a8f98")
    return (
        f'<g><rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7" fill="#fff" stroke="{colour}" '
        f'stroke-width="1.4"/><rect x="{x}" y="{y}" width="5" height="{BOX_HEIGHT}" rx="2" fill="{colour}"/>'
        f'<text x="{x + 14}" y="{y + 21}" font-size="13.5" font-weight="600" fill="#1f2933">{escape(name)}</text>'
        f'<text x="{x + 14}" y="{y + 37}" font-size="11" fill="{colour}">{escape(kind)}</text>'
        f'<text x="{x + 14}" y="{y + 53}" font-size="11" fill="#52606d">{escape(label)}</text></g>'
    )


def loss_curves(histories: dict[str, list[dict[str, Any]]], reference: float | None) -> str:
    """Training (thin) and held-out loss (points) against tokens; the unigram model's loss as a line."""
    figure = go.Figure()
    for number, (name, rows) in enumerate(histories.items()):
        colour = SERIES[number % len(SERIES)]
        trained = [row for row in rows if row.get("loss") is not None]
        held_out = [row for row in rows if row.get("heldout_loss") is not None]
        figure.add_scatter(
            x=[row["tokens"] for row in trained], y=[row["loss"] for row in trained], mode="lines",
            name=f"{name}, training", line={"color": colour, "width": 1}, opacity=0.55,
        )  # fmt: skip
        figure.add_scatter(
            x=[row["tokens"] for row in held_out], y=[row["heldout_loss"] for row in held_out], mode="lines+markers",
            name=f"{name}, held out", line={"color": colour, "width": 2}, marker={"size": 7},
        )  # fmt: skip
    if reference is not None:
        figure.add_hline(
            y=reference,
            line_dash="dash",
            line_color="#9aa5b1",
            annotation_text="unigram model",
            annotation_font_size=11,
        )
    return _finish(figure, "tokens", "loss, nats per token")


def learning_rate(rows: list[dict[str, Any]]) -> str:
    """Learning rate against tokens."""
    known = [row for row in rows if row.get("lr") is not None]
    figure = go.Figure()
    figure.add_scatter(
        x=[row["tokens"] for row in known], y=[row["lr"] for row in known], mode="lines", line={"color": SERIES[4]}
    )
    return _finish(figure, "tokens", "learning rate", height=260, legend=False)


def router_heatmap(load: list[list[float]]) -> str:
    """Fraction of assignments per layer (rows) and expert (columns) at the last step; even load is 1 / experts."""
    even = 1 / len(load[0])
    figure = go.Figure(
        go.Heatmap(
            z=load,
            zmin=0,
            zmax=2 * even,
            colorscale="Tealgrn",
            colorbar={"title": {"text": "share", "font": {"size": 11}}, "thickness": 12},
            hovertemplate="layer %{y}, expert %{x}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_yaxes(dtick=1, autorange="reversed")
    figure.update_xaxes(dtick=1 if len(load[0]) <= 32 else None)
    return _finish(figure, "expert", "layer", height=260, legend=False)


def router_balance(rows: list[dict[str, Any]]) -> str:
    """Busiest expert over the mean, worst layer, against tokens: 1 is even."""
    known = [row for row in rows if row.get("router_max_over_mean") is not None]
    figure = go.Figure()
    figure.add_scatter(
        x=[row["tokens"] for row in known], y=[row["router_max_over_mean"] for row in known], mode="lines",
        line={"color": SERIES[1]},
    )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    return _finish(figure, "tokens", "busiest expert / mean", height=260, legend=False)


def power(series: dict[str, list[tuple[float, str, int, float]]], kinds: dict[str, str]) -> str:
    """Watts of each node over time; a band per stage."""
    figure = go.Figure()
    points = [point for stage in series.values() for point in stage]
    if not points:
        return ""
    start = min(point[0] for point in points)
    hosts = sorted({point[1] for point in points})
    for number, host in enumerate(hosts):
        xs: list[float | None] = []
        ys: list[float | None] = []
        for stage in series.values():
            for when, _, _, watts in (point for point in stage if point[1] == host):
                xs.append((when - start) / 60)
                ys.append(watts)
            xs.append(None)
            ys.append(None)
        figure.add_scatter(x=xs, y=ys, mode="lines", name=host, line={"color": SERIES[number % 7], "width": 1.4})
    end = max(point[0] for point in points)
    for name, stage in series.items():
        if stage:
            low, high = (stage[0][0] - start) / 60, (stage[-1][0] - start) / 60
            wide = (stage[-1][0] - stage[0][0]) > 0.06 * (end - start)
            figure.add_vrect(
                x0=low, x1=high, fillcolor=COLOURS.get(kinds[name], "#8a8f98"), opacity=0.13, line_width=0,
                annotation_text=name if wide else "", annotation_position="top left", annotation_font_size=11,
            )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    return _finish(figure, "minutes since the first sample", "power per node, W", legend=len(hosts) > 1)


def energy_bars(joules: dict[str, float], kinds: dict[str, str]) -> str:
    """Watt-hours of each stage."""
    names = list(reversed(joules))
    figure = go.Figure(
        go.Bar(
            x=[joules[name] / 3600 for name in names],
            y=names,
            orientation="h",
            marker={"color": [COLOURS.get(kinds[name], "#8a8f98") for name in names]},
            text=[f"{joules[name] / 3600:.3g}" for name in names],
            textposition="outside",
            cliponaxis=False,
        )
    )
    return _finish(figure, "energy, Wh", "", height=60 + 30 * len(names), legend=False)


def before_after(pairs: dict[str, tuple[float, float]]) -> str:
    """Held-out loss of each task before and after its adapter."""
    figure = go.Figure()
    for position, label, colour in ((0, "base", "#c3cad3"), (1, "with adapter", SERIES[1])):
        values = [pair[position] for pair in pairs.values()]
        figure.add_bar(
            x=list(pairs), y=values, name=label, marker={"color": colour}, text=[f"{v:.3f}" for v in values],
            textposition="outside", cliponaxis=False,
        )  # fmt: skip
    figure.update_layout(barmode="group")
    return _finish(figure, "", "held-out loss, nats per token")


def size_quality(models: dict[str, tuple[float, float]]) -> str:
    """Perplexity against size on disk, one point a model."""
    figure = go.Figure()
    for number, (name, (megabytes, perplexity)) in enumerate(models.items()):
        figure.add_scatter(
            x=[megabytes], y=[perplexity], mode="markers+text", text=[name], textposition="top center", name=name,
            marker={"size": 13, "color": SERIES[number % 7]},
        )  # fmt: skip
    figure.update_xaxes(rangemode="tozero")
    figure.update_traces(cliponaxis=False)
    return _finish(figure, "size on disk, MB", "perplexity", legend=False)


def _finish(figure: Any, x: str, y: str, *, height: int = 340, legend: bool = True) -> str:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 62, "r": 22, "t": 26, "b": 48},
        font={"family": FONT, "size": 12, "color": "#323f4b"},
        showlegend=legend,
        legend={"orientation": "h", "y": 1.14, "x": 0, "font": {"size": 11}},
    )
    figure.update_xaxes(title={"text": x}, title_font_size=12)
    figure.update_yaxes(title={"text": y}, title_font_size=12)
    if x == "energy, Wh":
        figure.update_yaxes(automargin=True)
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    return html
