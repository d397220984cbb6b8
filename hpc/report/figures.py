"""Figures as plain dictionaries for plotly.js. Colours are names of the page's CSS variables ("@pretrain"): the page
fills them in for light and dark. What is longer than a screen is thinned (hpc/report/series.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hpc.report.series import POINTS, POINTS_PER_CURVE, evenly

Figure = dict[str, Any]
"""{data, layout}."""
SERIES = 7
"""Colours of curves that stand for no stage kind: @s0 ... @s6."""
JOULES_PER_KWH = 3.6e6


def series_colour(number: int) -> str:
    """One colour after the other."""
    return f"@s{number % SERIES}"


def finish(
    data: list[dict[str, Any]], x: str, y: str, *, height: int = 340, legend: bool = True, legend_y: float = 1.02,
    **layout: Any,
) -> Figure:  # fmt: skip
    """A figure with its axes named. legend_y: where its legend stands, in heights of the plot."""
    axes = {
        "xaxis": {"title": {"text": x}, **layout.pop("xaxis", {})},
        "yaxis": {"title": {"text": y}, "automargin": True, **layout.pop("yaxis", {})},
    }
    return {
        "data": data,
        "layout": {
            "height": height,
            "showlegend": legend,
            **({"legend": {"y": legend_y}} if legend else {}),
            **axes,
            **layout,
        },
    }


Row = Mapping[str, Any]


def loss_curves(curves: Mapping[str, Sequence[Row]], against: str, reference: float | None = None) -> Figure | None:
    """Training loss (thin) and held-out loss (points) of each curve, against `tokens` or `energy`; None without any.

    reference: the loss of a unigram model, drawn as a line.
    """
    data: list[dict[str, Any]] = []
    unit, joules = energy_unit(
        max((row.get("energy_j") or 0.0 for rows in curves.values() for row in rows), default=0.0)
    )

    def place(row: Row) -> float | None:
        if against == "tokens":
            return row.get("tokens")
        return None if row.get("energy_j") is None else digits(row["energy_j"] / joules)

    for number, (name, rows) in enumerate(curves.items()):
        colour = series_colour(number)
        for key, label in (("loss", "training"), ("heldout_loss", "held out")):
            known = [row for row in rows if row.get(key) is not None and place(row) is not None]
            if not known:
                continue
            known = evenly(known, min(POINTS_PER_CURVE, POINTS // (2 * len(curves))))
            thin = key == "loss"
            marker = {} if thin else {"marker": {"size": 6, "color": colour}}
            data.append(
                {
                    "type": "scatter", "mode": "lines" if thin else "lines+markers", "name": f"{name}, {label}",
                    "x": [place(row) for row in known], "y": [digits(row[key]) for row in known],
                    "line": {"color": colour, "width": 1.2 if thin else 2}, "opacity": 0.65 if thin else 1, **marker,
                }
            )  # fmt: skip
    if not data:
        return None
    shapes, notes = [], []
    if reference is not None:
        line = {"color": "@soft", "dash": "dash", "width": 1.2}
        shapes = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": reference, "y1": reference, "line": line}]
        notes = [
            {"xref": "paper", "x": 1, "y": reference, "text": "unigram model", "showarrow": False, "xanchor": "right",
             "yanchor": "bottom", "font": {"size": 11, "color": "@soft"}}
        ]  # fmt: skip
    label = "tokens" if against == "tokens" else f"energy of the stage so far, {unit}"
    return finish(data, label, "loss, nats per token", shapes=shapes, annotations=notes)


def energy_unit(most_j: float) -> tuple[str, float]:
    """kWh, or Wh where a run is too small for it, and its joules."""
    return ("kWh", JOULES_PER_KWH) if most_j >= 0.1 * JOULES_PER_KWH else ("Wh", 3600.0)


def learning_rate(curves: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Learning rate against tokens."""
    return _lines({n: _points(rows, "lr") for n, rows in curves.items()}, "tokens", "learning rate", rangemode="tozero")


def busiest_expert(curves: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Busiest expert over the mean, worst layer, against tokens: 1 is even."""
    points = {name: _points(rows, "router_max_over_mean") for name, rows in curves.items()}
    return _lines(points, "tokens", "busiest expert / mean", rangemode="tozero")


def router_entropy(rows: Sequence[Row]) -> Figure | None:
    """Entropy of the load of each layer against tokens, normalised: 1 is even."""
    known = evenly([row for row in rows if row.get("router_entropy")])
    if not known:
        return None
    layers = len(known[0]["router_entropy"])
    shown = evenly(range(layers), 12)
    known = evenly(known, max(60, POINTS // len(shown)))
    data = [
        {
            "type": "scatter", "mode": "lines", "name": f"layer {layer}", "x": [row["tokens"] for row in known],
            "y": [row["router_entropy"][layer] for row in known],
            "line": {"width": 1.3, "color": f"@shade:{number / max(1, len(shown) - 1):.3f}"},
        }
        for number, layer in enumerate(shown)
    ]  # fmt: skip
    lowest = min(min(line["y"]) for line in data)
    return finish(
        data, "tokens", "entropy of the load (1: even)", height=300, legend=len(shown) <= 12,
        yaxis={"range": [min(0.8, lowest - 0.02), 1.01]},
    )  # fmt: skip


def router_load(load: Sequence[Sequence[float]]) -> Figure:
    """Share of the assignments per layer (rows) and expert (columns), times the number of experts: 1 is even."""
    experts = len(load[0])
    z = [[digits(share * experts) for share in layer] for layer in load]
    most = max(2.0, min(6.0, max(max(row) for row in z)))
    data = {
        "type": "heatmap", "z": z, "zmin": 0, "zmax": most, "colorscale": f"@load:{1 / most:.3f}",
        "xgap": 1 if experts <= 64 else 0, "ygap": 1,
        "colorbar": {"thickness": 10, "title": {"text": "load", "font": {"size": 11}}, "outlinewidth": 0},
        "hovertemplate": "layer %{y}, expert %{x}: %{z:.2f} of an even share<extra></extra>",
    }  # fmt: skip
    dense = {"dtick": 1} if len(load) <= 16 else {}
    wide = {"dtick": 1} if experts <= 16 else {}
    height = max(220, min(520, 90 + 16 * len(load)))
    return finish(
        [data], "expert", "layer", height=height, legend=False, yaxis={"autorange": "reversed", **dense}, xaxis=wide
    )


def before_after(pairs: Mapping[str, tuple[float, float]]) -> Figure:
    """Held-out loss of each task before and after its adapter."""
    data = [
        {"type": "bar", "x": list(pairs), "y": [digits(pair[place]) for pair in pairs.values()], "name": label,
         "marker": {"color": colour}, "text": [f"{pair[place]:.3f}" for pair in pairs.values()],
         "textposition": "outside", "cliponaxis": False}
        for place, label, colour in ((0, "base", "@faint"), (1, "with adapter", "@lora"))
    ]  # fmt: skip
    return finish(data, "", "held-out loss, nats per token", height=320, barmode="group")


def size_quality(models: Mapping[str, tuple[float, float, float | None, str]]) -> Figure | None:
    """Perplexity against size on disk, area by the energy of the whole lineage. name -> (MB, perplexity, J, kind)."""
    if not models:
        return None
    most = max((joules or 0.0) for _, _, joules, _ in models.values())
    symbols = ("circle", "diamond", "square", "triangle-up", "cross", "star")
    data = [
        {
            "type": "scatter", "mode": "markers", "name": name, "x": [digits(size)], "y": [digits(perplexity)],
            "marker": {"size": 10 + 20 * ((joules or 0.0) / most) ** 0.5 if most else 14, "opacity": 0.85,
                       "color": series_colour(number), "symbol": symbols[number % len(symbols)],
                       "line": {"color": "@paper", "width": 1}},
            "hovertemplate": f"{name}: %{{x}} MB, perplexity %{{y}}"
            + (f", {joules / 3600:,.4g} Wh" if joules is not None else "") + "<extra></extra>",
        }
        for number, (name, (size, perplexity, joules, _)) in enumerate(models.items())
    ]  # fmt: skip
    biggest = max(size for size, *_ in models.values())
    return finish(data, "size on disk, MB", "perplexity", xaxis={"range": [0, 1.12 * biggest]}, height=320)


def _points(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    return evenly([(row["tokens"], row[key]) for row in rows if row.get(key) is not None])


def _lines(curves: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, **yaxis: str) -> Figure | None:
    data = [
        {"type": "scatter", "mode": "lines", "name": name, "x": [p[0] for p in points],
         "y": [digits(p[1]) for p in points], "line": {"color": series_colour(number), "width": 1.6}}
        for number, (name, points) in enumerate(curves.items()) if points
    ]  # fmt: skip
    return finish(data, x, y, height=300, legend=len(data) > 1, yaxis=yaxis) if data else None


def digits(value: float, count: int = 5) -> float:
    """A number with as many significant digits as a screen can show: pages stay small."""
    return float(f"{value:.{count}g}")
