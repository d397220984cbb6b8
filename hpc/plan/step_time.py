"""Seconds of one training step from a model's shape, a layout and an accelerator, part by part.

The model is analytical: work over rate, for each kind of work, with few constants that hold for all runs. Constants are
fitted on the rows of published.csv (`launch.py bench plan --fit` writes step_time.json) towards priors that say where
they come from; nothing is fitted to a run, a model or a source. `bench plan` prints the error in sample and the error
of each source predicted with constants that never saw it.

A micro-batch on one rank: matrix products at a part of the peak that falls when a side is short (the operands' bytes
over the memory bandwidth), attention's scores at a part of the bf16 peak plus its exponentials, what passes through
memory (norms, activations, permutation, quantization to fp8), starts of kernels, and the collectives that are not
hidden. A step: micro-batches, the pipeline's bubble, data-parallel traffic that is left over, the optimizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2

from hpc.plan.constants import Constants, constants
from hpc.plan.hardware import Accelerator
from hpc.plan.shapes import Shape
from hpc.plan.traffic import (
    context_parallel_bytes,
    copies,
    data_parallel_bytes,
    expert_parallel_bytes,
    pipeline_bytes,
    ring_seconds,
    tensor_parallel_bytes,
)

PRECISIONS = ("bf16", "fp8", "fp8_block", "mxfp8", "nvfp4")
"""fp8: one scale per tensor. fp8_block: scales per 128 x 128 and 1 x 128. mxfp8, nvfp4: per 32 and 16 values."""
FORMAT_OF = {"bf16": "bf16", "fp8": "fp8", "fp8_block": "fp8", "mxfp8": "fp8", "nvfp4": "fp4"}

RACK = 16
"""A fast domain with more accelerators is a rack."""
TILE = 256
"""Side of the tiles in which a product is computed, at the larger end; assumed. A side of 1856 costs as 2048."""
SCORE_PASSES = 2 * 15
"""Two-byte passes over scores without FlashAttention: forward, products, softmax and dropout write and read them (6);
backward 9. Twice, because the masked half of them passes as well."""
OPERAND_ITEM = {"bf16": 1.0, "fp8": 2 / 3, "fp4": 1 / 2}
"""Bytes of two inputs and one bf16 output of a product, over those of three bf16 operands."""


@dataclass(frozen=True)
class Layout:
    """How a run is spread: sizes of the parallel groups, batch, precision."""

    gpus: int
    seq: int
    global_batch: int
    """Sequences per step."""
    micro_batch: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    zero_stage: int = 1
    """0: plain data parallelism, 1 and 2: sharded optimizer, 3: sharded weights (FSDP)."""
    shard: int | None = None
    """Ranks over which ZeRO shards; all data-parallel ranks when None (hybrid sharding: those of one node)."""
    recompute: str = "none"
    precision: str = "bf16"
    unfused: bool = False
    """Scores of attention pass through memory, as before FlashAttention (2022)."""
    eager: bool = False
    """PyTorch's own kernels: FlashAttention 2, which Hopper runs at half of what newer kernels reach, and element-wise
    work that passes through memory more often than in fused kernels."""

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        return max(1, self.gpus // (self.tensor * self.pipeline * self.context))

    @property
    def micro_batches(self) -> float:
        """Micro-batches of one replica in a step."""
        return max(1.0, self.global_batch / (self.replicas * self.micro_batch))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and of its parts; the parts add up."""

    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Whole step."""
        return sum(self.parts.values())


def step_time(shape: Shape, layout: Layout, hardware: Accelerator, c: Constants | None = None) -> StepTime:
    """Seconds of one step (optimizer update) by part."""
    c = c or constants()
    once = _micro_batch(shape, layout, hardware, c)
    hidden_window = sum(once.values())
    parts = {name: value * layout.micro_batches for name, value in once.items()}
    work = sum(parts.values())
    parts["bubble"] = work * c.bubble * (layout.pipeline - 1) / (layout.virtual * layout.micro_batches)
    parts["data parallel"] = _data_parallel(shape, layout, hardware, c, hidden_window)
    parts["optimizer"] = _optimizer(shape, layout, hardware)
    slower = c.doubling * max(0.0, log2(layout.gpus / 8))
    parts["scale"] = slower * sum(parts.values())
    return StepTime(parts)


def _micro_batch(shape: Shape, layout: Layout, hardware: Accelerator, c: Constants) -> dict[str, float]:
    """Seconds of one micro-batch, forward and backward, in one pipeline stage."""
    tokens = layout.micro_batch * layout.seq / layout.context
    dense, experts, head = _products(shape, layout, hardware, c, tokens)
    attention = _attention(shape, layout, hardware, c, tokens)
    memory, cast = _memory(shape, layout, hardware, c, tokens)
    blocks = shape.attention_layers + shape.mamba_layers + shape.dense_layers + shape.moe_layers
    host = 1e-6 * (
        c.layer_us * (blocks - shape.moe_layers)
        + shape.moe_layers * (c.moe_us + c.expert_us * shape.experts / layout.expert)
    )
    if hardware.domain > RACK:
        host *= c.rack_host
    tensor, context, expert, pipeline = _collectives(shape, layout, hardware, c, tokens)
    forward = dense / 3 + experts / 3 + attention / 3.5 + memory / 3 + cast / 3 + tensor / 2 + expert / 2
    again = {"none": 0.0, "selective": c.selective, "full": 1.0}[layout.recompute]
    once = {"products": dense, "experts": experts, "attention": attention, "memory": memory, "casts": cast,
            "tensor parallel": tensor, "context parallel": context, "expert parallel": expert,
            "recompute": again * forward}  # fmt: skip
    once["host"] = _left_over(host * (1 + again / 3), sum(once.values()))
    per_stage = {name: value / layout.pipeline for name, value in once.items()}
    per_stage["head"] = head / layout.pipeline
    per_stage["pipeline"] = pipeline
    return per_stage


def _product(rows: float, inputs: int, outputs: float, rate: float, short: tuple[float, float]) -> float:
    """Forward and backward of one product: six FLOPs a weight and row, slower when a side is short.

    `short` are the lengths of rows, and of inputs or outputs, at which the operands' traffic takes as long as the
    FLOPs.
    """
    wide, tall = _padding(outputs), _padding(inputs)
    tiles = (wide + tall + wide * tall) / 3
    traffic = short[0] / max(rows, 1) + short[1] * (1 / inputs + 1 / outputs)
    return 6.0 * rows * inputs * outputs / rate * (tiles + traffic)


def _padding(side: float) -> float:
    """Work of whole tiles over work asked for, along one side of a product's result."""
    return ceil(side / TILE) * TILE / side


def _products(
    shape: Shape, layout: Layout, hardware: Accelerator, c: Constants, tokens: float
) -> tuple[float, float, float]:
    """Seconds of dense products, of the routed experts' and of the head, on one rank."""
    form = FORMAT_OF[layout.precision]
    rate = hardware.peak(form) * c.gemm(hardware.family, form)
    plain = hardware.peak("bf16") * c.gemm(hardware.family, "bf16")
    mixer = plain if form == "fp4" and shape.mamba_layers else rate  # hybrid recipes keep fp4 to the experts
    tp = layout.tensor

    def total(products: list[tuple[int, int]], rows: float, split: int, at: float) -> float:
        scale = at * (1.0 if at == plain else OPERAND_ITEM[form]) / hardware.hbm_bytes_per_s
        short = (c.row_bytes * scale, c.operand_bytes * scale)
        return sum(_product(rows, k, n / split, at, short) for k, n in products)

    dense = (
        shape.attention_layers * total(shape.attention_products(), tokens, tp, mixer)
        + shape.mamba_layers * total(shape.mamba_products(), tokens, tp, mixer)
        + shape.dense_layers * total(shape.feed_forward_products(shape.dense_size), tokens, tp, rate)
        + shape.moe_layers * total(shape.always_products(), tokens, tp, rate)
    )
    local = max(1.0, shape.experts / layout.expert)
    rows = tokens / tp * shape.top_k / local  # each of the tp ranks routes its own part of the tokens
    experts = shape.moe_layers * local * total(shape.expert_products(), rows, 1, rate) / c.grouped
    head = total(shape.head_products(), tokens, tp, plain) + 20.0 * tokens * shape.vocab / tp / hardware.hbm_bytes_per_s
    return dense, experts, head


def _attention(shape: Shape, layout: Layout, hardware: Accelerator, c: Constants, tokens: float) -> float:
    """Seconds of scores, softmax and weighted values: backward is 2.5 forwards, exp() is computed in both.

    Training kernels skip little of what lies outside a window, so windows save no time here.
    """
    forward = shape.attention_flops(layout.seq, windows=False) * tokens / layout.tensor
    keys = forward / (2.0 * (shape.head_dim + shape.values))
    unfused = 2.0 * SCORE_PASSES * keys / hardware.hbm_bytes_per_s if layout.unfused else 0.0
    part = c.attention_flash2 if layout.eager and hardware.family == "hopper" else c.attention
    products = 3.5 * forward / (hardware.peak("bf16") * part)
    return products + 2 * c.exponentials * keys / hardware.exponentials_per_s + unfused


def _memory(shape: Shape, layout: Layout, hardware: Accelerator, c: Constants, tokens: float) -> tuple[float, float]:
    """Seconds of what only passes through memory, and of quantization. Two bytes a value; counts are reads + writes."""
    h, ffn = shape.hidden, shape.matrices - 1
    heads = shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim
    values = (
        shape.attention_layers * (14 * h + 6 * heads)
        + shape.dense_layers * (14 * h + 4 * ffn * shape.dense_size)
        + shape.moe_layers * (14 * h + 4 * ffn * shape.shared_size)
    )
    routed = shape.moe_layers * (
        13 * h  # the router works in fp32: copies of its input and of its gradient
        + shape.top_k * (8 * (shape.latent or h) + 4 * ffn * shape.expert_size)
    )
    scan = shape.mamba_layers * (14 * h + 12 * shape.mamba_inner)
    passes = c.element_bytes * (c.eager_bytes if layout.eager else 1.0)
    moved = passes * values + c.moe_bytes * routed + c.mamba_bytes * scan
    cast = 0.0
    if layout.precision != "bf16":
        always = shape.always_products()
        inputs = (
            shape.attention_layers * _sides(shape.attention_products())
            + shape.mamba_layers * _sides(shape.mamba_products())
            + shape.dense_layers * _sides(shape.feed_forward_products(shape.dense_size))
            + shape.moe_layers * (_sides(always) + shape.top_k * _sides(shape.expert_products()))
        )
        fine = 1.0 if layout.precision == "fp8" else c.cast_scales
        cast = c.cast_bytes * fine * 2 * inputs  # read two bytes, write one or two of one byte
    per_byte = tokens / layout.tensor / hardware.hbm_bytes_per_s
    return 2 * moved * per_byte, cast * per_byte


def _sides(products: list[tuple[int, int]]) -> int:
    """Values a token that are quantized: inputs forward, gradients of outputs backward."""
    return sum(inputs + outputs for inputs, outputs in products)


def _collectives(
    shape: Shape, layout: Layout, hardware: Accelerator, c: Constants, tokens: float
) -> tuple[float, float, float, float]:
    """Seconds of tensor, context, expert and pipeline parallel traffic of a micro-batch that are not hidden."""
    links = (hardware.domain, hardware.link_bytes_per_s, hardware.network_bytes_per_s)
    tp, cp = layout.tensor, layout.context
    layers = (shape.attention_layers + shape.mamba_layers + shape.dense_layers + shape.moe_layers) / 2
    tensor = layers * tensor_parallel_bytes(tokens, shape.hidden, tp)
    context = 0.0
    if cp > 1:
        width = shape.kv_heads * (shape.head_dim + shape.values) // tp
        sent = shape.attention_layers * context_parallel_bytes(tokens, max(1, width), cp)
        context = sent * c.context_exposed / (hardware.link_bytes_per_s if tp * cp <= hardware.domain else links[2])
    expert = 0.0
    if layout.expert > 1 and shape.moe_layers:
        item = 1.0 if layout.precision == "fp8_block" else 2.0
        width = shape.latent or shape.hidden
        inside = min(layout.expert, hardware.domain)
        nodes = max(1, layout.expert // inside)
        ranks = copies(shape.top_k, layout.expert)
        each = expert_parallel_bytes(tokens / tp, width, ranks, layout.expert, item)
        expert = each * c.expert_exposed / hardware.link_bytes_per_s
        if nodes > 1:
            crossing = expert_parallel_bytes(tokens / tp, width, copies(shape.top_k, nodes), nodes, item)
            expert = max(expert, crossing * c.expert_network / hardware.network_bytes_per_s)
        expert *= shape.moe_layers
    pipeline = 0.0
    if layout.pipeline > 1:
        sent = pipeline_bytes(tokens / tp, shape.hidden, layout.virtual)
        near = tp * cp * layout.pipeline <= hardware.domain
        pipeline = sent * c.pipeline_exposed / (hardware.link_bytes_per_s if near else hardware.network_bytes_per_s)
    return c.tensor_exposed * ring_seconds(tensor, tp, *links), context, expert, pipeline


def _data_parallel(shape: Shape, layout: Layout, hardware: Accelerator, c: Constants, window: float) -> float:
    """Seconds of gradients and weights between replicas that a micro-batch's work (`window`) does not hide."""
    links = (hardware.domain, hardware.link_bytes_per_s, hardware.network_bytes_per_s)
    group = max(1, layout.gpus // (layout.tensor * layout.pipeline))
    replicas = max(1, layout.gpus // (layout.pipeline * layout.expert))
    stage = layout.zero_stage
    item = 2.0 if stage == 3 else 4.0
    per_step = per_micro = 0.0
    split = layout.tensor * layout.pipeline
    for parameters, ranks, near in (
        (shape.dense_parameters / split, group, layout.tensor),
        (shape.expert_parameters / (layout.pipeline * layout.expert), replicas, min(layout.expert, hardware.domain)),
    ):
        if ranks < 2 or not parameters:
            continue
        sharded = min(ranks, layout.shard or ranks)
        sent = data_parallel_bytes(parameters, sharded, stage, 2.0, item)
        per_step += ring_seconds(sent.per_step, sharded, *links, near)
        per_micro += ring_seconds(sent.per_micro_batch, sharded, *links, near)
        if sharded < ranks:
            per_step += ring_seconds(2 * item * parameters / sharded, ranks // sharded, 1, *links[1:])
    step, micro = c.data_exposed * per_step, c.data_exposed * per_micro
    return _left_over(step, window) + layout.micro_batches * _left_over(micro, window)


def _left_over(seconds_needed: float, window: float) -> float:
    """What is left of something beside other work: little while it is shorter, the difference when much longer."""
    return float((seconds_needed**3 + window**3) ** (1 / 3) - window) if seconds_needed else 0.0


def _optimizer(shape: Shape, layout: Layout, hardware: Accelerator) -> float:
    """Seconds of Adam: about 30 bytes a parameter read and written (fp32 master, two moments, gradient, weight)."""
    split = layout.tensor * layout.pipeline
    dense = shape.dense_parameters / split
    experts = shape.expert_parameters / (layout.pipeline * layout.expert)
    if layout.zero_stage:
        dense /= layout.shard or max(1, layout.gpus // split)
        experts /= max(1, layout.gpus // (layout.pipeline * layout.expert))
    return 30.0 * (dense + experts) / hardware.hbm_bytes_per_s
