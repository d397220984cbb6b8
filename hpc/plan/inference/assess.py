"""A model on a machine: what each format takes, whether that fits, how fast it answers, what it costs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hpc.plan.inference.cache import cache_bytes, longest_context, overhead_bytes
from hpc.plan.inference.cost import Cost, of
from hpc.plan.inference.formats import FORMATS, Family, Format, Kind, Size, size
from hpc.plan.inference.machines import Machine
from hpc.plan.inference.speed import bound, expected
from hpc.plan.inference.subject import Subject
from hpc.plan.quantity import Quantity

Fits = Literal["fits", "fits with a raised limit", "does not fit"]
CONTEXT = 8192
"""Tokens, when nobody says how many."""
PREFERRED: dict[Kind, tuple[Family, ...]] = {
    "apple": ("gguf", "mlx"), "cpu": ("gguf",), "gpu": ("compressed-tensors", "gguf"),
}  # fmt: skip
"""What is recommended first: where losses are published, and what servers compute with."""


@dataclass(frozen=True)
class Row:
    """One format on one machine."""

    format: str
    made_by: str
    size: Size
    bits_per_weight: float
    cache: float
    """Bytes of keys and values at the context."""
    overhead: float
    total: float
    """Bytes in all."""
    fits: Fits
    missing: float
    """Bytes that are lacking to fit even with a raised limit; 0 when it fits."""
    longest_context: int
    """Tokens that fit, with a raised limit if need be."""
    bound: Quantity
    expected: Quantity
    costs: tuple[Cost, ...]


@dataclass(frozen=True)
class Fit:
    """A model on a machine, in all formats that run there."""

    subject: Subject
    machine: Machine
    context: int
    rows: tuple[Row, ...]
    """Most bits first."""

    @property
    def recommended(self) -> Row | None:
        """The format to take: of those that fit, without a raised limit where there are four bits that way, the one
        with most bits, of the families that are preferred on such a machine. Sixteen bits only where nothing else is:
        eight cost 0.03 to 0.07 % where that was measured."""
        for family in (*PREFERRED[self.machine.kind], None):
            rows = [row for row in self.rows if _family(row) == family or family is None]
            plain = [row for row in rows if row.fits == "fits"]
            raised = [row for row in rows if row.fits != "does not fit"]
            chosen = plain if any(row.bits_per_weight > 4 for row in plain) else raised
            if chosen:
                return max(chosen, key=lambda row: row.bits_per_weight)
        return None

    def row(self, form: str) -> Row | None:
        """The row of a format, None where it does not run on such a machine."""
        return next((row for row in self.rows if row.format == form), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        best = self.recommended
        return {
            "machine": asdict(self.machine) | {"usable": self.machine.usable, "raised": self.machine.raised},
            "context": self.context,
            "rows": [asdict(row) for row in self.rows],
            "recommended": best.format if best else None,
        }


def _family(row: Row) -> Family | None:
    form = FORMATS.get(row.format)
    return form.family if form else None


def context_of(subject: Subject, wanted: int | None) -> int:
    """Tokens to plan for: as asked, else 8,192 or what the model was made for."""
    return wanted or min(CONTEXT, subject.context or CONTEXT)


def assess(subject: Subject, machine: Machine, context: int, costs: Sequence[Cost]) -> Fit:
    """All formats of a model on a machine; only the one that it has, when it is quantized and runs there as it is."""
    known = [*subject.costs, *costs]
    if subject.stored is not None and _runs(subject.stored.format, machine):
        rows: Iterable[Row] = [
            _row(subject, machine, context, known, subject.stored.format, "as it is", subject.stored.size)
        ]
    else:
        rows = [
            _row(subject, machine, context, known, form.name, form.made_by, size(subject.shape, form))
            for form in _on(machine)
        ]
    return Fit(subject, machine, context, tuple(sorted(rows, key=lambda row: -row.size.weights)))


def _runs(form: str, machine: Machine) -> bool:
    """Whether a machine computes with a format; of one that is not ours it is taken for granted."""
    return form not in FORMATS or machine.kind in FORMATS[form].runs_on


def _on(machine: Machine) -> list[Format]:
    return [form for form in FORMATS.values() if machine.kind in form.runs_on]


def _row(
    subject: Subject, machine: Machine, context: int, costs: Sequence[Cost], form: str, made_by: str, held: Size
) -> Row:
    shape = subject.shape
    cache, overhead = cache_bytes(shape, context), overhead_bytes(shape)
    total = held.weights + cache + overhead
    fits: Fits = "does not fit"
    if total <= machine.raised:
        fits = "fits" if total <= machine.usable else "fits with a raised limit"
    return Row(
        form, made_by, held, held.bits_per_weight, cache, overhead, total, fits, max(0.0, total - machine.raised),
        longest_context(shape, machine.raised - held.weights - overhead, subject.context),
        bound(shape, held, context, machine), expected(shape, held, context, machine),
        tuple(of(costs, subject.name, form)),
    )  # fmt: skip
