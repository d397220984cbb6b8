"""Tokens per second while a model answers one person: every token reads the active weights and the cache once.

The bound is bandwidth / bytes read. What runtimes reach of it is estimated by two constants for each kind of machine, a
part of the bandwidth and a time for each layer (kernels are started one after the other, which is what small active
models on wide memories wait for):

    seconds = bytes / (part x bandwidth) + layers x seconds per layer

They are fitted, least sum of |log ratio|, on the published measurements of hpc/plan/decode_speed.csv that say `yes` in
the column `fitted` (the others are there with the reason); tests/plan/test_inference.py repeats the fit.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hpc.plan.catalogue import plain_name
from hpc.plan.inference.cache import cache_bytes
from hpc.plan.inference.formats import Kind, Size
from hpc.plan.inference.machines import Machine
from hpc.plan.quantity import Quantity, unknown
from hpc.plan.shapes import Shape


@dataclass(frozen=True)
class Reached:
    """What runtimes reach on a kind of machine, and how well that is known."""

    part: float
    """Of the data sheet's bandwidth."""
    layer_s: float
    """Seconds for each layer besides."""
    rows: int
    """Published measurements that the two were fitted on."""
    median_error: float
    left_out: float
    """Median error on the devices that were left out of the fit, each in its turn."""
    within: float
    """Nine in ten of the rows are predicted to this."""

    @property
    def trust(self) -> str:
        """What an estimate rests on."""
        if self.rows == 1:
            return "from one published measurement"
        return (
            f"from {self.rows} published measurements (median error {self.median_error:.0%}, {self.left_out:.0%} on "
            "devices left out of the fit)"
        )


REACHED: Mapping[Kind, Reached] = {
    "apple": Reached(0.89, 195e-6, 33, 0.07, 0.09, 0.32),
    "gpu": Reached(0.90, 105e-6, 30, 0.08, 0.10, 0.32),
    "cpu": Reached(0.77, 0.0, 1, 0.0, 0.0, 0.0),
}
"""llama.cpp (MLX in three rows), batch of one, 2023 to 2026. Of laptop CPUs there is one measurement."""


@dataclass(frozen=True)
class Measurement:
    """Tokens per second that somebody published."""

    device: str
    kind: Kind
    bandwidth: float
    """Bytes per second, by the data sheet."""
    runtime: str
    model: str
    format: str
    context: int
    """Tokens that were in the cache, on average."""
    tokens_per_s: float
    source: str
    fitted: bool
    note: str


def measurements() -> list[Measurement]:
    """All rows of hpc/plan/decode_speed.csv."""
    with (Path(__file__).parent.parent / "decode_speed.csv").open(encoding="utf-8", newline="") as file:
        return [_measurement(row) for row in csv.DictReader(file)]


def _measurement(row: dict[str, str]) -> Measurement:
    return Measurement(
        row["device"], cast(Kind, row["kind"]), 1e9 * float(row["bandwidth_gb_s"]), row["runtime"], row["model"],
        row["format"], int(row["context"]), float(row["tokens_per_s"]), row["source"], row["fitted"] == "yes",
        row["note"],
    )  # fmt: skip


def measured(model: str, machine: Machine) -> list[Measurement]:
    """What others measured of a model on such a machine, early in a conversation."""
    name = plain_name(model.rstrip("/").split("/")[-1])
    return [
        one
        for one in measurements()
        if one.device == machine.chip and plain_name(one.model) == name and one.fitted and one.context < 1024
    ]


def layers(shape: Shape) -> int:
    """Blocks that one token passes one after the other."""
    return max(shape.attention_layers + shape.mamba_layers, shape.dense_layers + shape.moe_layers)


def bytes_per_token(shape: Shape, size: Size, context: int) -> float:
    """Bytes that one token reads after `context` tokens: active weights, head, cache."""
    return size.read + cache_bytes(shape, context)


def bound(shape: Shape, size: Size, context: int, machine: Machine) -> Quantity:
    """The most tokens per second that the memory allows."""
    if machine.bandwidth is None:
        return unknown("tokens/s", "nobody said the memory's bandwidth: --bandwidth 100GB/s")
    read = bytes_per_token(shape, size, context)
    how = f"derived: {machine.bandwidth / 1e9:g} GB/s / {read / 1e9:.3g} GB read per token at {context:,} tokens"
    return Quantity(machine.bandwidth / read, "tokens/s", how)


def expected(shape: Shape, size: Size, context: int, machine: Machine) -> Quantity:
    """Tokens per second that a runtime probably reaches."""
    if machine.bandwidth is None:
        return unknown("tokens/s", "nobody said the memory's bandwidth: --bandwidth 100GB/s")
    reached = REACHED[machine.kind]
    read = bytes_per_token(shape, size, context)
    seconds = read / (reached.part * machine.bandwidth) + layers(shape) * reached.layer_s
    return Quantity(
        1 / seconds, "tokens/s",
        f"estimated: {reached.part:.0%} of the bandwidth and {1e6 * reached.layer_s:.0f} us a layer, {reached.trust}",
    )  # fmt: skip
