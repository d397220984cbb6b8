"""The chain as a picture: SVG whose colours are the page's variables, so that it follows light and dark.

Wide screens get it from left to right, narrow ones from top to bottom; the page shows one of the two.
"""

from collections.abc import Mapping, Sequence
from html import escape

from hpc.report.facts import StageFacts

WIDTH, HEIGHT, GAP, ROW_GAP, MARGIN = 160, 66, 36, 18, 8
ABREAST = 2
"""Boxes beside each other on a narrow screen."""
MARKS = {"done": "✓", "running": "▶", "failed": "✗", "damaged": "✗", "silent": "?", "stopped": "‖", "not started": ""}
"""State -> sign in the corner of a box."""
NAME_LETTERS, LABEL_LETTERS = 15, 24
"""What fits a box in the two sizes of letters."""

Place = tuple[float, float]


def chain_svg(stages: Sequence[StageFacts], labels: Mapping[str, str], *, downwards: bool) -> str:
    """The chain by depth of dependency. labels: a line of text for each stage's name."""
    if not stages:
        return ""
    levels = _levels(stages)
    if downwards:
        levels = [names[at : at + ABREAST] for names in levels for at in range(0, len(names), ABREAST)]
    widest = max(len(level) for level in levels)
    along, across = (HEIGHT + GAP, WIDTH + ROW_GAP) if downwards else (WIDTH + GAP, HEIGHT + ROW_GAP)
    place: dict[str, Place] = {}
    for depth, names in enumerate(levels):
        for number, name in enumerate(names):
            a = MARGIN + depth * along
            b = MARGIN + ((widest - len(names)) / 2 + number) * across
            place[name] = (b, a) if downwards else (a, b)
    width = 2 * MARGIN + max(x for x, _ in place.values()) - MARGIN + WIDTH
    height = 2 * MARGIN + max(y for _, y in place.values()) - MARGIN + HEIGHT
    depths = {name: depth for depth, names in enumerate(levels) for name in names}
    edges = [
        _edge(place[need], place[stage.name], downwards=downwards, is_long=depths[stage.name] - depths[need] > 1)
        for stage in stages
        for need in stage.needs
        if need in place
    ]
    boxes = [_box(place[stage.name], stage, labels.get(stage.name, "")) for stage in stages]
    kind = "down" if downwards else "across"
    return (
        f'<svg class="chain {kind}" viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-label="stages of the chain and what they need">{"".join(edges + boxes)}</svg>'
    )


def _levels(stages: Sequence[StageFacts]) -> list[list[str]]:
    """Names by the length of the longest way that leads to them."""
    depth: dict[str, int] = {}
    by_name = {stage.name: stage for stage in stages}

    def level(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((level(need) for need in by_name[name].needs if need in by_name), default=-1)
        return depth[name]

    levels: list[list[str]] = [[] for _ in range(1 + max(level(stage.name) for stage in stages))]
    for stage in stages:
        levels[depth[stage.name]].append(stage.name)
    return levels


def _edge(source: Place, target: Place, *, downwards: bool, is_long: bool) -> str:
    if downwards:
        x1, y1, x2, y2 = source[0] + WIDTH / 2, source[1] + HEIGHT, target[0] + WIDTH / 2, target[1]
        bend = max(18.0, (y2 - y1) / 2)
        curve = f"M{x1:g} {y1:g} C{x1:g} {y1 + bend:g} {x2:g} {y2 - bend:g} {x2:g} {y2:g}"
    else:
        x1, y1, x2, y2 = source[0] + WIDTH, source[1] + HEIGHT / 2, target[0], target[1] + HEIGHT / 2
        bend = max(18.0, (x2 - x1) / 2)
        curve = f"M{x1:g} {y1:g} C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2:g} {y2:g}"
    return (
        f'<path d="{curve}" fill="none" class="{"edge long" if is_long else "edge"}"/>'  # long: behind what it passes
    )


def _box(corner: Place, stage: StageFacts, label: str) -> str:
    x, y = corner
    colour = f"var(--{stage.kind}, var(--soft))"
    dashes = ' stroke-dasharray="4 3"' if stage.state != "done" else ""
    title = f"{stage.name} ({stage.kind}): {stage.state}{': ' + stage.text if stage.text else ''}. {label}"
    return (
        f'<g class="{stage.state.replace(" ", "-")}"><title>{escape(title)}</title>'
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="7" class="box" style="stroke:{colour}"'
        f'{dashes}/><rect x="{x:g}" y="{y:g}" width="5" height="{HEIGHT}" rx="2" style="fill:{colour}"/>'
        f'<text x="{x + 14:g}" y="{y + 22:g}" class="name">{escape(_short(stage.name, NAME_LETTERS))}</text>'
        f'<text x="{x + WIDTH - 10:g}" y="{y + 22:g}" class="mark" text-anchor="end">{MARKS[stage.state]}</text>'
        f'<text x="{x + 14:g}" y="{y + 39:g}" class="kind" style="fill:{colour}">{escape(stage.kind)}</text>'
        f'<text x="{x + 14:g}" y="{y + 55:g}" class="label">{escape(_short(label, LABEL_LETTERS))}</text></g>'
    )


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
