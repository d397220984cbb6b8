"""`bench train`: our engine against other trainers, and our expert layer against the limit of this machine.

Same model, weights, tokens, core, thread count and allocator settings for everybody. Each peer alternates with ours
step by step; its ratio is the median over the rounds, so that a slower minute of the machine hits both.
"""

import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from hpc.bench.experts import Layer, measure
from hpc.bench.peers import PEERS, Case, ours
from hpc.bench.turns import Clock, Failed, Side, apart, serve
from hpc.config.train import Training
from hpc.plan.flops import training_flops_per_token

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""Of every side, besides what a rank of ours runs with."""

EXPERTS = (8, 32, 64, 128)
VOCAB_SIZE = 4096
WARM_UP = 2
"""Steps after the first one that are not timed, the same for all: kernels are generated, memory grows."""
SLOW_S = 3.0
"""A side whose first step takes longer has no more warm-up and one round: the bench has to end."""


@dataclass(frozen=True)
class Row:
    """One side and one model."""

    side: str
    num_experts: int
    tokens_per_s: float | None
    """Median over the rounds."""
    ratio: float | None
    """Our tokens/s over its own, median over the rounds in which both took turns."""
    flops: float | None
    """Model FLOP/s, see `hpc.plan.flops`."""
    of_limit: float | None
    """Of the dense-GEMM limit."""
    memory_gib: float | None
    """Peak resident memory above that of the imported libraries."""
    loss: float | None
    """Of the last step of the first round: the same weights and tokens give the same one."""
    note: str = ""


def case(num_experts: int, ranks: int, quick: bool) -> Case:
    """Models of equal active FLOPs: only the number of experts differs. 17 M parameters with 8, 206 M with 128."""
    settings = Training.model_validate(
        {
            "model": {"hidden_size": 256, "num_layers": 8, "num_attention_heads": 4, "expert_size": 256},
            "router": {"num_experts": num_experts, "top_k": 2, "aux_loss": 0.01},
            "batches": {
                "seq_len": 512,
                "micro_batch_size": 4,
                "tokens_per_step": 512 * 4 * (1 if quick else 2) * ranks,
            },
            "steps": 1000,
            "optimizer": {"lr": 1e-4},
            "parallel": {"ranks_per_node": ranks, "expert_parallel_size": ranks},
        }
    )
    return Case(settings, VOCAB_SIZE, ranks)


def bench(
    environment: dict[str, str], ranks: int, quick: bool, clock: Clock, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Run everything; returns what --json prints."""
    serve(["hpc.bench.peers", "hpc.bench.experts", "litgpt.model"], {**environment, **ENVIRONMENT})
    tell(f"{platform.processor() or platform.machine()}, {ranks} rank(s) of one thread, fp32, {clock} seconds")
    layer: Layer = apart(measure, 3 if quick else 5, EXPERTS, clock)
    for line in layer_lines(layer):
        tell(line)
    tell(
        "model FLOPs per token: 3 x (2 x active matrix parameters + 4 L H S), PaLM (arXiv:2204.02311, appendix B); "
        "ratio: ours / peer, median of alternating rounds"
    )
    tell(HEADER)
    rows: list[Row] = []
    for num_experts in (8, 32) if quick else EXPERTS:
        for row in compare(
            case(num_experts, ranks, quick), layer.limit_flops * ranks, 2 if quick or num_experts > 32 else 3, clock
        ):
            tell(row_line(row))
            rows.append(row)
    return {
        "ratio_best_peer": min(filter(None, (row.ratio for row in rows if row.side in PEERS)), default=None),
        "ratio_hf_eager": next(
            (row.ratio for row in rows if row.side.endswith("eager") and row.num_experts == 32), None
        ),
        "roofline_fraction": {number: layer.fastest / seconds for number, seconds in layer.experts.items()},
        "torch_mm_fraction": {number: layer.torch_mm / seconds for number, seconds in layer.experts.items()},
        "growth_8_to_128": layer.experts[128] / layer.experts[8],
        "limit_flops": layer.limit_flops,
        "torch_mm_limit_flops": layer.limit_flops * layer.fastest / layer.torch_mm,
        "rows": [asdict(row) for row in rows],
    }


def compare(model: Case, limit_flops: float, rounds: int, clock: Clock = "wall") -> Iterator[Row]:
    """One row for each peer, then ours: warm-up, then `rounds` rounds of one step each."""
    settings = model.settings
    tokens = settings.batches.tokens_per_step
    flops = training_flops_per_token(settings.model, settings.router, model.vocab_size, settings.batches.seq_len)
    number = settings.router.num_experts

    def row(side: str, seconds: list[float], ratio: float | None, memory: float, loss: float, note: str) -> Row:
        speed = tokens / median(seconds)
        return Row(side, number, speed, ratio, speed * flops, speed * flops / limit_flops, memory, loss, note)

    us = Side(ours, model, model.ranks, clock)
    first = us.turn(1)
    us.turn(WARM_UP)
    own, memory = [], first.memory_gib
    for name, program in PEERS.items():
        note = " ".join((program.__doc__ or "").split())
        theirs, here = [], []
        try:
            peer = Side(program, model, model.ranks, clock)
        except Failed as why:
            yield Row(name, number, None, None, None, None, None, None, str(why))
            continue
        try:
            start = peer.turn(1)
            is_slow = start.seconds > SLOW_S
            if not is_slow:
                peer.turn(WARM_UP)
            for _ in range(1 if is_slow else rounds):
                turn = us.turn(1)
                here.append(turn.seconds)
                last = peer.turn(1)
                theirs.append(last.seconds)
                memory = max(memory, turn.memory_gib)
        except Failed as why:
            yield Row(name, number, None, None, None, None, None, None, str(why))
            continue
        finally:
            peer.close()
        own += here
        ratio = median(b / a for a, b in zip(here, theirs, strict=True))
        yield row(name, theirs, ratio, last.memory_gib, start.loss, note)
    us.close()
    yield row("ours", own, None, memory, first.loss, " ".join((ours.__doc__ or "").split()))


HEADER = (
    f"{'side':<24} {'E':>4} {'tokens/s':>9} {'ratio':>6} {'GFLOP/s':>8} {'of limit':>8} {'peak GiB':>8} {'loss':>8}"
)


def row_line(row: Row) -> str:
    """One line of the table."""
    if row.tokens_per_s is None:
        return f"{row.side:<24} {row.num_experts:>4} {row.note}"
    ratio = f"{row.ratio:.2f}" if row.ratio else ""
    return (
        f"{row.side:<24} {row.num_experts:>4} {row.tokens_per_s:>9.0f} {ratio:>6} {(row.flops or 0) / 1e9:>8.1f} "
        f"{row.of_limit:>8.0%} {row.memory_gib:>8.2f} {row.loss:>8.4f}"
    )


def layer_lines(layer: Layer) -> list[str]:
    """The expert layer's part of the table."""
    mm = layer.limit_flops * layer.fastest / layer.torch_mm
    lines = [
        "expert layer, forward and backward, 4096 tokens, H 512, I 1024, top-2, one thread",
        f"dense limit {layer.limit_flops / 1e9:.0f} GFLOP/s (fastest kernel for each product); torch.mm {mm / 1e9:.0f}",
        f"{'E':>4} {'ms':>7} {'of limit':>9} {'of torch.mm':>12}",
    ]
    for number, seconds in layer.experts.items():
        lines.append(
            f"{number:>4} {seconds * 1e3:>7.0f} {layer.fastest / seconds:>9.2f} {layer.torch_mm / seconds:>12.2f}"
        )
    return [*lines, f"growth from {min(layer.experts)} to {max(layer.experts)} experts: "
            f"{layer.experts[max(layer.experts)] / layer.experts[min(layer.experts)]:.2f}"]  # fmt: skip
