"""One row a format: what the stages of a finished chain left about it in their receipts, each figure with its origin.

Loss is what an `evaluate` stage measured, on the same text for an artifact and its source; where none did, what the
artifact's own proof saw. KL divergence and top-1 agreement are always the proof's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc.config import Export, Quantize, Stage
from hpc.run.directory import RunDirectory
from hpc.run.receipt import Receipt, read_receipt

OUTSIDE = ("embedding and head", "norms", "router")
"""Groups of tensors (hpc/model/build.py) that are none of the layers' matrices, which all formats quantize."""


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from; None where it is not known."""

    value: float | None
    provenance: str
    """'measured: ...', 'derived: ...' or 'estimated: ...'."""


@dataclass(frozen=True)
class Row:
    """A model in one format."""

    stage: str
    format: str
    made_by: Stage
    """The stage as it was asked for."""
    runtime: str | None = None
    """Who reads it."""
    refused: str | None = None
    """Why there is no artifact; None where there is one."""
    figures: dict[str, Figure] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """A figure's number, None where it is not known."""
        return self.figures[name].value if name in self.figures else None


def format_words(stage: Stage) -> str:
    """What a stage makes, in the words of a table."""
    if isinstance(stage, Export):
        return f"{stage.format} imatrix" if stage.importance_tokens else stage.format
    if not isinstance(stage, Quantize):
        return "as it was"
    if stage.format == "fp8":
        return "fp8"
    bits = f"mixed {stage.bits_per_weight:g}" if stage.bits_per_weight else f"int{stage.bits}"
    return f"{bits} {stage.method} g{stage.group_size}{'' if stage.symmetric else ' asymmetric'}"


def read_rows(
    run: RunDirectory, stages: Sequence[Stage], source: str, refused: Mapping[str, str] | None = None
) -> list[Row]:
    """The source's row, then one for each stage that makes a format of it. Raises ArtifactError for a torn receipt."""
    receipts = {stage.name: read_receipt(run.stage(stage.name)) for stage in stages}
    judges = [one for one in receipts.values() if one is not None and one.kind == "evaluate"]
    why = refused or {}
    rows = []
    for stage in stages:
        if stage.name != source and not (isinstance(stage, (Quantize, Export)) and source in stage.needs):
            continue
        words, receipt = format_words(stage), receipts[stage.name]
        if receipt is None:
            rows.append(Row(stage.name, words, stage, refused=why.get(stage.name, "it was not made")))
            continue
        found = dict(_source_size(receipt)) if stage.name == source else dict(_proof(receipt))
        runtime, judged = _judged(judges, stage.name, source)
        rows.append(Row(stage.name, words, stage, runtime, figures={**found, **judged}))
    return sorted(rows, key=lambda row: row.stage != source)


def _source_size(receipt: Receipt) -> Iterator[tuple[str, Figure]]:
    weights = sum(int(file["bytes"]) for file in receipt.files if str(file["path"]).endswith(".safetensors"))
    parameters = sum(int(group.get("parameters", 0)) for group in receipt.census.values())
    yield "artifact_bytes", Figure(receipt.size_bytes, "measured: all files of the artifact")
    bits = 8 * weights / parameters if parameters else None
    yield "bits_per_weight", Figure(bits, "derived: weight files / parameters, embedding and head included")


def _proof(receipt: Receipt) -> Iterator[tuple[str, Figure]]:
    """What a quantize or export stage says of its artifact."""
    for name in ("artifact_bytes", "bits_per_weight", "kl", "top1_agreement", "perplexity_ratio", "bits_per_byte"):
        yield name, _metric(receipt, name)
    yield "matrix_bits_per_weight", _matrix_bits(receipt)
    peak = "quantize_peak_bytes" if receipt.kind == "quantize" else "export_peak_bytes"
    yield "peak_bytes", _metric(receipt, peak)
    yield "seconds", Figure(receipt.seconds, "measured: wall time of the stage, its proof included")


def _metric(receipt: Receipt, name: str) -> Figure:
    return Figure(receipt.metrics.get(name), receipt.provenance.get(name, "not measured"))


def _matrix_bits(receipt: Receipt) -> Figure:
    """Bits of the matrices of layers: a quantize stage tells, an export's census is summed up."""
    if "matrix_bits_per_weight" in receipt.metrics:
        return _metric(receipt, "matrix_bits_per_weight")
    groups = [group for name, group in receipt.census.items() if name not in OUTSIDE]
    parameters = sum(group.get("parameters", 0) for group in groups)
    bits = 8 * sum(group["bytes"] for group in groups) / parameters if parameters else None
    return Figure(bits, "derived: bytes of attention and feed-forward matrices / their weights")


def _judged(judges: Sequence[Receipt], name: str, source: str) -> tuple[str | None, dict[str, Figure]]:
    """Runtime and figures of the first evaluate stage that had the artifact and its source before it."""
    for receipt in judges:
        models, runtimes = receipt.metrics["models"], receipt.metrics.get("runtimes", {})
        if name in models and source in models:
            speed: dict[str, Any] = runtimes.get(name, {})
            return speed.get("runtime"), dict(_evaluated(receipt, name, source, speed))
    return None, {}


def _evaluated(receipt: Receipt, name: str, source: str, speed: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    text, before = next(iter(receipt.metrics["models"][source].items()))
    after = receipt.metrics["models"][name][text]
    where = f"by stage {receipt.stage}, {after['tokens']:,} held-out tokens of {text}"
    yield "evaluated_tokens", Figure(after["tokens"], f"measured: {where}")
    yield "bits_per_byte", Figure(after["bits_per_byte"], f"derived from the measured loss: {where}")
    yield (
        "perplexity_ratio",
        Figure(after["perplexity"] / before["perplexity"], f"derived from measured losses: {where}"),
    )
    how = receipt.provenance.get("runtimes", "not measured")
    yield "tokens_per_s", Figure(speed.get("tokens_per_s"), how)
    yield "memory_bytes", Figure(speed.get("memory_bytes"), how)
    counters = "; ".join(map(str, receipt.energy.get("provenance", []))) or "no counter"
    yield "j_per_token", Figure(speed.get("j_per_token"), f"{counters}; joules of the node while it wrote / new tokens")
