"""'Quantization makes a model four times smaller at little loss': our own mixture measured, beside published figures.

The mixture of `launch.py bench shrink` is trained, quantized and exported by its chain, run as a user runs it; the rows
are those of the bench. Published rows are those of hpc/plan/quantization_cost.csv whose size is known. Small is the
whole file, embedding and head included; loss is perplexity beside the model's in 16 bits or more.
"""

from collections.abc import Sequence

from hpc.bench.claims.claim import QUOTED, Bench, Claim, Entry, Measured, Premise, Step, Verdict
from hpc.bench.claims.page import figure
from hpc.bench.claims.trained import Load
from hpc.bench.shrink import MOE, QUICK_FORMATS, shrink
from hpc.bench.shrink_rows import Row
from hpc.bench.shrink_targets import INT4
from hpc.plan.inference.cost import PUBLISHED, Cost, read_costs

NAME = "quantized-size-and-loss"
STATEMENT = "Quantization makes a model four times smaller at little loss of quality."
FORMATS = ("int8", "int4-auto_round", "gguf-q8_0", "gguf-q4_k_m", "gguf-iq4_xs")
SHOWN = {
    "bits_per_weight": "bits", "matrix_bits_per_weight": "bits", "perplexity_ratio": "", "kl": "nats",
    "top1_agreement": "", "tokens_per_s": "tokens/s",
}  # fmt: skip
"""Figures of a row that the page has -> their units."""


def audit(bench: Bench) -> Claim:
    """Train, quantize, compare, judge. Raises the error that the chain ended with."""
    load = Load()
    rows = shrink(bench, MOE, QUICK_FORMATS if bench.quick else FORMATS).rows
    load.look()
    costs = published()
    verdict, because = judged(rows, costs, bench.quick)
    return Claim(
        name=NAME,
        statement=STATEMENT,
        said_by=QUOTED,
        kind="run here",
        verdict=verdict,
        because=because,
        depends_on=(
            f"what a quarter is: four bits and the scales that they need are at most {INT4.most_bits:g} bits a weight "
            f"of 16, {INT4.most_bits / 16:.0%}; from 32 bits, in which small models are often kept, it is less",
            f"what little is: {INT4.most_ratio - 1:.0%} of perplexity here; 4 bits cost more of it the smaller and the "
            "better trained a model is (Llama 3 beside Llama 2 in the published rows), and tasks may show it sooner",
            "what is quantized: a small model has much of itself in embedding and head, which the formats of servers "
            "leave in 16 or 32 bits; GGUF rounds them too",
            "how: rounding to nearest in large groups, learned rounding and mixes of types differ by more than the "
            "models do",
            "the text: ours is that of the training mixture, held out; published rows are wikitext-2's",
            "the model measured here, 9 M parameters trained for minutes: a model that has learned little has "
            "little to lose",
        ),
        premises=premises(costs),
        arithmetic=arithmetic(rows),
        measured=(*(line for row in rows for line in _lines(row)), load.told),
    )


def published() -> list[Cost]:
    """Rows of others whose whole file is of the int4 class."""
    known = [cost for cost in read_costs(PUBLISHED) if cost.bits_per_weight is not None]
    return [cost for cost in known if INT4.above_bits < (cost.bits_per_weight or 0.0) <= INT4.most_bits]


def premises(costs: Sequence[Cost]) -> tuple[Premise, ...]:
    """The published rows, one premise each."""
    return tuple(
        Premise(f"{cost.model}, {cost.format}, {cost.bits_per_weight:g} bits: perplexity / that in {cost.against}",
                cost.ppl_ratio, "", f"{cost.source} ({cost.measured_by})")
        for cost in costs
    )  # fmt: skip


def arithmetic(rows: Sequence[Row]) -> tuple[Step, ...]:
    """Part of a file in 16 bits, and the change of perplexity, of every row in reach of a quarter."""
    steps = []
    for row in _quarters(rows):
        bits, ratio = row.value("bits_per_weight") or 0.0, row.value("perplexity_ratio") or 0.0
        steps += [
            Step(f"{row.format}, part of 16 bits", f"{figure(bits)} / 16", bits / 16, ""),
            Step(f"{row.format}, perplexity more, %", f"100 x ({figure(ratio)} - 1)", 100 * (ratio - 1), "%"),
        ]
    return tuple(steps)


def judged(rows: Sequence[Row], costs: Sequence[Cost], quick: bool) -> tuple[Verdict, str]:
    """The verdict, by the best format of a quarter of 16 bits here and by how many published ones keep to the limit."""
    limit, ours = INT4.most_ratio, _quarters(rows)
    keep = [cost for cost in costs if cost.ppl_ratio <= limit]
    changes = sorted(cost.ppl_ratio - 1 for cost in costs)
    others = f"of {len(costs)} published figures {len(keep)} keep to {limit - 1:.0%}"
    if changes:
        others += f" ({changes[0]:+.1%} to {changes[-1]:+.1%})"
    if not ours:
        here = f"no format of at most {INT4.most_bits:g} bits for the whole file was made here"
    else:
        best = ours[0]
        here = (
            f"here {best.format}, {best.value('bits_per_weight'):.2f} bits for the whole file, costs "
            f"{(best.value('perplexity_ratio') or 0.0) - 1:+.2%} of perplexity"
        )
    told = f"{here}; {others}."
    if quick:
        return "cannot be told", f"A quick run, a model of 60 steps, shows the method and proves nothing: {told}"
    if not ours:
        return "cannot be told", told
    ours_keep = (ours[0].value("perplexity_ratio") or 0.0) <= limit
    if ours_keep and len(keep) == len(costs):
        return "holds", told
    if ours_keep or keep:
        return "holds if", f"the format is chosen by the loss that was measured for that very model: {told}"
    return "does not hold here", told


def _quarters(rows: Sequence[Row]) -> list[Row]:
    """Rows whose whole file is of the int4 class, the best first."""
    small = [row for row in rows if (row.value("bits_per_weight") or 99.0) <= INT4.most_bits]
    known = [row for row in small if row.value("perplexity_ratio") is not None]
    return sorted(known, key=lambda row: row.value("perplexity_ratio") or 0.0)


def _lines(row: Row) -> list[Measured]:
    if row.refused is not None:
        return [Measured(f"{row.format} is refused", None, "", f"measured: {row.refused}")]
    return [
        Measured(f"{name.replace('_', ' ')} of {row.format}", row.figures[name].value, unit,
                 row.figures[name].provenance)
        for name, unit in SHOWN.items()
        if name in row.figures
    ]  # fmt: skip


ENTRY = Entry(NAME, STATEMENT, "run here", audit)
