"""`launch.py fit` for people: a table of formats for one machine, or of machines, and one sentence of advice."""

from collections.abc import Iterable, Sequence

from hpc.plan.inference.assess import Fit, Row
from hpc.plan.inference.cache import cache_bytes, overhead_bytes
from hpc.plan.inference.cost import Cost
from hpc.plan.inference.machines import Machine
from hpc.plan.inference.speed import REACHED
from hpc.plan.quantity import GIB, Quantity
from hpc.plan.show import amount

FORMATS_HEAD = (
    "format", "fits", "bits/weight", "weights GiB", "in all GiB", "longest context", "tokens/s at most", "expected",
    "perplexity",
)  # fmt: skip
MACHINES_HEAD = (
    "machine", "GB/s", "for the GPU GiB", "raised", "best format", "fits", "in all GiB", "longest context",
    "tokens/s at most", "expected", "perplexity",
)  # fmt: skip
FOUR_BITS = "gguf-q4_k_m"


def render(fits: Sequence[Fit]) -> str:
    """The formats on one machine, or the best one on each of several."""
    return "\n".join([*_head(fits[0]), "", *(_formats(fits[0]) if len(fits) == 1 else _machines(fits))])


def _head(fit: Fit) -> list[str]:
    subject, shape = fit.subject, fit.subject.shape
    sizes = fit.rows[0].size
    limit = f", made for {subject.context:,}" if subject.context else ""
    return [
        f"{subject.name}: {amount(sizes.parameters)} parameters; shape from {subject.source}",
        f"context {fit.context:,} tokens{limit}: {cache_bytes(shape, fit.context) / GIB:.2f} GiB of keys and values in "
        f"fp16 (derived), {overhead_bytes(shape) / GIB:.2f} GiB for the runtime (estimated)",
    ]


def _formats(fit: Fit) -> list[str]:
    machine = fit.machine
    rows = [
        (
            row.format, _verdict(row), f"{row.bits_per_weight:.2f}", _gib(row.size.weights), _gib(row.total),
            _tokens(row), _speed(row.bound), _speed(row.expected), loss(row.costs),
        )
        for row in fit.rows
    ]  # fmt: skip
    return [
        _about(machine), "", *_table(FORMATS_HEAD, rows, left=(0, 1, 8)), "", *_notes(fit.rows, machine), "",
        advice(fit),
    ]  # fmt: skip


def _machines(fits: Sequence[Fit]) -> list[str]:
    rows = []
    for fit in fits:
        machine, best = fit.machine, fit.recommended
        told: tuple[str, ...] = ("-", f"no: {_gib(_least(fit).missing)} GiB too little", *["-"] * 5)
        if best is not None:
            told = (
                best.format, _verdict(best), _gib(best.total), _tokens(best), _speed(best.bound), _speed(best.expected),
                loss(best.costs),
            )  # fmt: skip
        speed = "-" if machine.bandwidth is None else f"{machine.bandwidth / 1e9:g}"
        rows.append((machine.name, speed, _gib(machine.usable), _gib(machine.raised), *told))
    shown = [row for fit in fits if (row := fit.recommended) is not None]
    return [
        *_table(MACHINES_HEAD, rows, left=(0, 4, 5, 10)), "", *_notes(shown, fits[0].machine), *_four_bits(fits), "",
        _ladder_advice(fits),
    ]  # fmt: skip


def _four_bits(fits: Sequence[Fit]) -> list[str]:
    """Where the format that most people mean by 'in 4 bits' fits."""
    found = [(fit, row) for fit in fits if (row := fit.row(FOUR_BITS)) is not None]
    if not found:
        return []
    told = [f"{fit.machine.name}: {_verdict(row)}" for fit, row in found]
    return [f"in 4 bits ({FOUR_BITS}, {_gib(found[0][1].size.weights)} GiB): {'; '.join(told)}"]


def _ladder_advice(fits: Sequence[Fit]) -> str:
    smallest = next((fit for fit in fits if fit.recommended is not None), None)
    if smallest is None:
        return f"It fits none of them; on the largest: {advice(fits[-1])}"
    return f"The smallest that holds it: {advice(smallest)}"


def advice(fit: Fit) -> str:
    """One sentence: which format to take on a machine and how it is made, or by how much the smallest is too large."""
    best, machine = fit.recommended, fit.machine
    if best is None:
        least = _least(fit)
        return (
            f"{machine.name} cannot hold it: the smallest format ({least.format}) needs {_gib(least.total)} GiB of "
            f"{_gib(machine.raised)}, {_gib(least.missing)} too much at {fit.context:,} tokens."
        )
    speed = "" if best.expected.value is None else f", about {best.expected.value:.3g} tokens/s (estimated)"
    raise_it = ""
    if best.fits == "fits with a raised limit":
        raise_it = f", after `sudo sysctl iogpu.wired_limit_mb={int(machine.raised / 2**20)}`"
    told = loss(best.costs)
    price = "what it costs in loss is not measured for this model" if not best.costs else f"perplexity {told}"
    made = "" if best.made_by == "as it is" else f"; made by {best.made_by}"
    return (
        f"{machine.name}: take {best.format}: {_gib(best.total)} GiB of {_gib(machine.usable)}{raise_it}{speed}; "
        f"{price}{made}."
    )


def _least(fit: Fit) -> Row:
    return min(fit.rows, key=lambda row: row.total)


def _about(machine: Machine) -> str:
    speed = "bandwidth not known" if machine.bandwidth is None else f"{machine.bandwidth / 1e9:g} GB/s"
    if machine.kind == "apple":
        room = (
            f"macOS lets the GPU use {_gib(machine.usable)} GiB, at most {_gib(machine.raised)} with a raised limit "
            "(iogpu.wired_limit_mb)"
        )
    elif machine.kind == "gpu":
        room = f"{_gib(machine.usable)} GiB"
    else:
        room = f"{_gib(machine.usable)} GiB besides the system's own (assumed)"
    return f"{machine.name}, {speed}: {room}"


def _notes(rows: Iterable[Row], machine: Machine) -> list[str]:
    """What the columns rest on."""
    reached = REACHED[machine.kind]
    trust = f"{reached.rows} published measurements, median error {reached.median_error:.0%}"
    costs = {(cost.measured_by, cost.source) for row in rows for cost in row.costs}
    lines = [
        "weights: derived, tensor by tensor; tokens/s at most: derived, bandwidth / bytes read per token with a full",
        f"context; expected: estimated from {trust if reached.rows > 1 else 'one published measurement'} (batch of one)",
    ]
    if costs:
        told = "; ".join(f"{who}, {source}" for who, source in sorted(costs))
        lines.append(f"perplexity against 16 or 8 bits: measured by {told}")
    else:
        lines.append("perplexity: no measurement of this model is known here; `bench shrink` measures one")
    return lines


def loss(costs: Sequence[Cost]) -> str:
    """'+1.5 %', '+1.5 to +3.6 %' where measurements differ, 'unknown' without any."""
    if not costs:
        return "unknown"
    low, high = (100 * (f(cost.ppl_ratio for cost in costs) - 1) for f in (min, max))
    first, last = f"{low:+.2g}", f"{high:+.2g}"
    return f"{first} %" if first == last else f"{first} to {last} %"


def _verdict(row: Row) -> str:
    if row.fits == "does not fit":
        return f"no: {_gib(row.missing)} GiB too little"
    return "yes" if row.fits == "fits" else "raised limit"


def _tokens(row: Row) -> str:
    return f"{row.longest_context:,}" if row.longest_context else "-"


def _gib(value: float) -> str:
    return f"{value / GIB:.3g}" if value < 100 * GIB else f"{value / GIB:,.0f}"


def _speed(quantity: Quantity) -> str:
    return "-" if quantity.value is None else f"{quantity.value:.3g}"


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

