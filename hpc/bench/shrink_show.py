"""The tables of `bench shrink` for people: one for each model, what each column is, and what the targets say."""

from collections.abc import Iterable, Iterator
from textwrap import wrap

from hpc.bench.shrink import Shrunk
from hpc.bench.shrink_rows import Row
from hpc.bench.shrink_targets import Judged

WIDTH = 118
COLUMNS = (
    ("MB", "artifact_bytes", 1e-6, ".1f", 8),
    ("b/w", "bits_per_weight", 1, ".2f", 6),
    ("layers", "matrix_bits_per_weight", 1, ".2f", 7),
    ("b/byte", "bits_per_byte", 1, ".4f", 8),
    ("ppl x", "perplexity_ratio", 1, ".4f", 8),
    ("KL", "kl", 1, ".1e", 8),
    ("top-1", "top1_agreement", 100, ".1f", 6),
    ("tok/s", "tokens_per_s", 1, ".3g", 6),
    ("J/tok", "j_per_token", 1, ".3g", 7),
    ("s", "seconds", 1, ".0f", 5),
    ("GiB", "peak_bytes", 2**-30, ".2f", 6),
)
"""Heading, figure, factor, digits, width."""
LEGEND = (
    "MB: all files of the artifact; b/w: bits per weight of all tensors; layers: of attention and feed-forward alone",
    "b/byte, ppl x: loss on held-out text by the artifact's own runtime; perplexity / the unquantized model's",
    "KL (nats a token), top-1 (%): the reload proof, artifact beside its source",
    "tok/s, J/tok: writing one answer on this machine; joules are the node's, whoever used it",
    "s, GiB: the stage that made it, its proof included; the most memory of one process",
    "all measured, or derived from what was; joules estimated where no counter is; --json says it for each figure",
)


def show(tables: Iterable[Shrunk]) -> str:
    """All tables."""
    lines = [line for table in tables for line in (*_table(table), "")]
    return "\n".join([*lines, *LEGEND])


def _table(table: Shrunk) -> Iterator[str]:
    yield table.title
    if table.why is not None:
        yield from wrap(f"not measured: {table.why}", WIDTH, initial_indent="  ", subsequent_indent="  ")
        return
    width = max(len(row.format) for row in table.rows) + 1
    yield "format".ljust(width) + "runtime".ljust(13) + "".join(name.rjust(size) for name, *_, size in COLUMNS)
    for row in table.rows:
        yield _row(row, width)
    for row in table.rows:
        if row.refused is not None:
            yield from wrap(f"{row.format} is refused: {row.refused}", WIDTH, subsequent_indent="  ")
    for judged in table.judged:
        yield from _judged(judged)


def _row(row: Row, width: int) -> str:
    if row.refused is not None:
        return row.format.ljust(width) + "refused, see below"
    cells = "".join(_cell(row.value(name), factor, digits, size) for _, name, factor, digits, size in COLUMNS)
    return row.format.ljust(width) + (row.runtime or "-").ljust(13) + cells


def _cell(value: float | None, factor: float, digits: str, size: int) -> str:
    return ("-" if value is None else format(value * factor, digits)).rjust(size)


def _judged(judged: Judged) -> Iterator[str]:
    word = {True: "YES", False: "NO", None: "CANNOT BE TOLD"}[judged.holds]
    yield from wrap(f"{judged.target}? {word}: {judged.because}", WIDTH, subsequent_indent="  ")
