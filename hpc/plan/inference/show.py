"""`launch.py fit` for people: a table of formats for one machine, or of machines, and one sentence of advice."""

from collections.abc import Iterable, Sequence
from textwrap import wrap

from hpc.plan.inference.assess import Fit, Row
from hpc.plan.inference.cache import cache_bytes, overhead_bytes
from hpc.plan.inference.cost import Cost
from hpc.plan.inference.machines import Machine
from hpc.plan.inference.speed import REACHED, measured
from hpc.plan.quantity import GIB, Quantity, amount

WIDTH = 118
FORMATS_HEAD = (
    "format", "fits", "bits", "weights", "in all", "longest context", "at most", "expected", "perplexity",
)  # fmt: skip
MACHINES_HEAD = (
    "machine", "GB/s", "for GPU", "raised", "format", "fits", "in all", "longest context", "at most", "expected",
    "perplexity",
)  # fmt: skip
FOUR_BITS = "gguf-q4_k_m"
"""What most people mean by 'in four bits'."""
ENOUGH_BITS = 4.0
"""Below so many bits per weight every published loss is above 4 %: said in the advice."""


def render(fits: Sequence[Fit], costs: Sequence[Cost]) -> str:
    """The formats on one machine, or the best one on each of several. costs: of all models, for the advice."""
    body = _formats(fits[0], costs) if len(fits) == 1 else _machines(fits, costs)
    return "\n".join([*_head(fits[0]), "", *body])


def _head(fit: Fit) -> list[str]:
    subject, shape, sizes = fit.subject, fit.subject.shape, fit.rows[0].size
    limit = f", made for {subject.context:,}" if subject.context else ""
    if subject.context and fit.context > subject.context:
        limit = f", MORE than the {subject.context:,} that it was made for"
    return [
        f"{subject.name}: {amount(sizes.parameters)} parameters, {amount(_active(fit))} of them read for each token; "
        f"shape from {subject.source}",
        f"context {fit.context:,} tokens{limit}: {cache_bytes(shape, fit.context) / GIB:.2f} GiB of keys and values in "
        f"fp16 (derived), {overhead_bytes(shape) / GIB:.2f} GiB for the runtime (estimated)",
    ]


def _active(fit: Fit) -> float:
    """Parameters that one token reads, from the share of bytes where a file says no more."""
    size = fit.rows[0].size
    return size.parameters * size.read / size.weights


def _formats(fit: Fit, costs: Sequence[Cost]) -> list[str]:
    rows = [
        (
            row.format, _verdict(row), f"{row.bits_per_weight:.2f}", _gib(row.size.weights), _gib(row.total),
            _tokens(row), _speed(row.bound), _speed(row.expected), loss(row.costs),
        )
        for row in fit.rows
    ]  # fmt: skip
    table = _table(FORMATS_HEAD, rows, left=(0, 1, 8))
    told = [_about(fit.machine), "", *table, "", *_notes(fit.rows, fit.machine), *_measured(fit)]
    return [*told, "", advice(fit, costs)]


def _measured(fit: Fit) -> list[str]:
    """What others measured of this model on this chip, from one source after the other."""
    found = measured(fit.subject.name, fit.machine)
    lines = []
    for source in dict.fromkeys(one.source for one in found):
        told = ", ".join(f"{one.format} {one.tokens_per_s:.1f}" for one in found if one.source == source)
        lines.append(f"measured at the beginning of a context: {told} tokens/s ({source})")
    return [part for line in lines for part in wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)]


def _machines(fits: Sequence[Fit], costs: Sequence[Cost]) -> list[str]:
    rows = []
    for fit in fits:
        machine, best = fit.machine, fit.recommended
        told: tuple[str, ...] = ("-", _verdict(_least(fit)), *["-"] * 5)
        if best is not None:
            told = (
                best.format, _verdict(best), _gib(best.total), _tokens(best), _speed(best.bound), _speed(best.expected),
                loss(best.costs),
            )  # fmt: skip
        speed = "-" if machine.bandwidth is None else f"{machine.bandwidth / 1e9:g}"
        rows.append((machine.name, speed, _gib(machine.usable), _gib(machine.raised), *told))
    table = _table(MACHINES_HEAD, rows, left=(0, 4, 5, 10))
    shown = [row for fit in fits if (row := fit.recommended) is not None]
    return [*table, "", *_notes(shown, fits[0].machine), *_four_bits(fits), "", _ladder_advice(fits, costs)]


def _four_bits(fits: Sequence[Fit]) -> list[str]:
    """Which machine is the first that holds the model in four bits."""
    found = [(fit.machine, row) for fit in fits if (row := fit.row(FOUR_BITS)) is not None]
    if not found:
        return []
    raised = next((machine.name for machine, row in found if row.fits == "fits with a raised limit"), None)
    plain = next((machine.name for machine, row in found if row.fits == "fits"), None)
    told = [f"from {plain} up"] if plain else []
    told += [f"with a raised limit on {raised}"] if raised else []
    weights = _gib(found[0][1].size.weights)
    return [f"in four bits ({FOUR_BITS}, {weights} GiB of weights): {', '.join(told) or 'on none of these'}"]


def _ladder_advice(fits: Sequence[Fit], costs: Sequence[Cost]) -> str:
    held = [(fit, best) for fit in fits if (best := fit.recommended) is not None]
    if not held:
        return advice(fits[-1], costs)
    good = next((fit for fit, best in held if best.bits_per_weight >= ENOUGH_BITS), held[0][0])
    return f"The smallest that holds it well: {advice(good, costs)}"


def advice(fit: Fit, costs: Sequence[Cost]) -> str:
    """One sentence: which format to take on a machine and how it is made, or by how much the smallest is too large."""
    best, machine = fit.recommended, fit.machine
    if best is None:
        least = _least(fit)
        return (
            f"{machine.name} cannot hold it: {least.format}, the smallest, needs {_gib(least.total)} GiB of "
            f"{_gib(machine.raised)} at {fit.context:,} tokens: take a larger machine, a shorter context or a smaller "
            "model."
        )
    room = f"{_gib(best.total)} of {_gib(machine.usable)} GiB"
    if best.fits == "fits with a raised limit":
        limit = int(machine.raised / 2**20)
        room = f"{_gib(best.total)} of {_gib(machine.raised)} GiB after `sudo sysctl iogpu.wired_limit_mb={limit}`"
    speed = "" if best.expected.value is None else f", about {_speed(best.expected)} tokens/s (estimated)"
    made = "" if best.made_by == "as it is" else f"; made by {best.made_by}"
    return f"{machine.name}: take {best.format}: {room}{speed}, {_price(best, costs)}{made}."


def _price(row: Row, costs: Sequence[Cost]) -> str:
    few = f", and {row.bits_per_weight:.1f} bits are few" if row.bits_per_weight < ENOUGH_BITS else ""
    if row.costs:
        return f"perplexity {loss(row.costs)} (measured){few}"
    others = [cost for cost in costs if cost.format == row.format]
    told = f"; of other models {loss(others)}" if others else ""
    return f"perplexity of this model not measured{told}{few}"


def _least(fit: Fit) -> Row:
    return min(fit.rows, key=lambda row: row.total)


def _about(machine: Machine) -> str:
    speed = "bandwidth not known" if machine.bandwidth is None else f"{machine.bandwidth / 1e9:g} GB/s"
    if machine.kind == "apple":
        room = (
            f"macOS lets the GPU use {_gib(machine.usable)} GiB, {_gib(machine.raised)} with a raised limit "
            "(iogpu.wired_limit_mb)"
        )
    elif machine.kind == "gpu":
        room = f"{_gib(machine.usable)} GiB"
    else:
        room = f"{_gib(machine.usable)} GiB besides what the system keeps (assumed)"
    return f"{machine.name}, {speed}: {room}"


def _notes(rows: Iterable[Row], machine: Machine) -> list[str]:
    """What the columns rest on."""
    costs = sorted({(cost.measured_by, cost.source) for row in rows for cost in row.costs})
    told = "; ".join(f"{who}, {source}" for who, source in costs)
    known = f"measured, against 16 or 8 bits: {told}" if costs else "no measurement of this model is known here"
    lines = [
        "bits per weight and GiB: derived, tensor by tensor",
        f"tokens/s after a full context, one at a time: at most, derived: bandwidth / bytes read; expected, estimated "
        f"{REACHED[machine.kind].trust}",
        f"perplexity: {known}",
    ]
    return [part for line in lines for part in wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)]


def loss(costs: Sequence[Cost]) -> str:
    """'+1.5 %', '+1.5 to +3.6 %' where measurements differ, 'unknown' without any."""
    if not costs:
        return "unknown"
    ratios = [cost.ppl_ratio for cost in costs]
    first, last = f"{100 * (min(ratios) - 1):+.2g}", f"{100 * (max(ratios) - 1):+.2g}"
    return f"{first} %" if first == last else f"{first} to {last} %"


def _verdict(row: Row) -> str:
    if row.fits == "does not fit":
        return f"no: {_gib(row.missing)} GiB short"
    return "yes" if row.fits == "fits" else "raised limit"


def _tokens(row: Row) -> str:
    return f"{row.longest_context:,}" if row.longest_context else "-"


def _gib(value: float) -> str:
    gib = value / GIB
    return f"{gib:.2g}" if gib < 1 else f"{gib:.1f}" if gib < 100 else f"{gib:,.0f}"


def _speed(quantity: Quantity) -> str:
    if quantity.value is None:
        return "-"
    return f"{quantity.value:.1f}" if quantity.value < 100 else f"{quantity.value:,.0f}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]
