"""Bytes that one rank of a training stage holds at its fullest, part by part, as this engine really has them.

A rank's memory is what stays (weights, optimizer states, buffers, the process itself) and the most that comes and goes:
a forward pass, a backward pass, an update, an evaluation, writing the model. On a CPU that is resident memory, counted
by the kernel (VmHWM); on an accelerator it is device memory, and what waits in the host's memory is told apart.

Sources: ZeRO (arXiv:1910.02054, section 3) for what is sharded; DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py,
stage3.py) and hpc/train/engine.py for the copies and buffers that there are besides; hpc/plan/activations.py. What was
measured says so at its constant; tests/plan/test_memory.py compares all of it with real runs.

Symbols: N parameters on this rank (dense + experts / EP), n its share of all that are trained (trained / ranks), b
bytes of an item (2 or 4).
"""

from dataclasses import dataclass

from hpc.config import AdapterTraining, TrainingBase
from hpc.config.train import ReloraTraining
from hpc.plan.activations import FP32, Activations, activations
from hpc.plan.facts import Facts
from hpc.plan.imbalance import Imbalance, imbalance
from hpc.plan.params import Parameters, attention_matrices, count_adapter
from hpc.plan.process import ADAPTER_HOLES_BYTES, ADAPTER_LIBRARY_BYTES, HEAP_SLACK, PROCESS_BYTES, kernel_bytes

REDUCE_BUCKET = 100_000_000
"""Elements of the buffer in which gradients are exchanged (hpc/train/deepspeed_config.py), at most as many as
are trained."""
LIVE_PARAMETERS = 1_050_000_000
"""Parameters that ZeRO 3 keeps gathered at a time: stage3_max_live_parameters and stage3_prefetch_bucket_size."""
PACKED_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight in NF4: 4, an 8-bit scale for 64 of them, and an fp32 scale for 256 of those (arXiv:2305.14314)."""
ACCELERATOR_BYTES = 1.5 * 2**30
"""Context, libraries' kernels and workspaces, NCCL's channels on an accelerator; assumed."""


@dataclass(frozen=True)
class Part:
    """Something in memory, with the formula that its size comes from."""

    name: str
    bytes: float
    formula: str


@dataclass(frozen=True)
class Memory:
    """Of the fullest rank."""

    states: tuple[Part, ...]
    """Tensors that stay from the first step to the last."""
    passes: tuple[Part, ...]
    """Tensors that come and go in each part of the work; only the largest counts."""
    heap: tuple[Part, ...]
    """What else is in the heap of a rank on a CPU: the copy for checkpoints, kernels."""
    process: Part
    """What is there before there is a model."""
    slack: float
    """Heap over what is in use at its fullest: a heap that is not given back to the system has holes."""
    host: tuple[Part, ...]
    """In the host's memory, when the rank itself computes on an accelerator."""
    load: Imbalance

    @property
    def fullest(self) -> Part:
        """The largest of `passes`."""
        return max(self.passes, key=lambda part: part.bytes)

    @property
    def tensors(self) -> float:
        """Bytes of tensors at their most, without the copy for checkpoints."""
        return sum(part.bytes for part in self.states) + self.fullest.bytes

    @property
    def bytes(self) -> float:
        """What has to fit."""
        return self.process.bytes + self.slack * (self.tensors + sum(part.bytes for part in self.heap))


@dataclass(frozen=True)
class _Sizes:
    """Counts that several parts share."""

    here: float
    """N: parameters on this rank, gathered."""
    own: float
    """n: this rank's share of the trained parameters."""
    trained_here: float
    trained: int
    gathered: float
    """Parameters that other ranks hold parts of, under ZeRO 3."""
    matrices: float
    """Part of the trained parameters that Muon updates."""
    item: int
    packed: float = 0.0
    """Frozen parameters on this rank that are held in four bits."""


def training_memory(
    facts: Facts, settings: TrainingBase, precision: str, *, on_cpu: bool, load: Imbalance | None = None
) -> Memory:
    """Memory of the fullest rank of a training stage. Without `load` imbalance is estimated; its p99 is planned for."""
    item = FP32 if precision == "fp32" else 2
    load = load or imbalance(facts.router, settings.parallel.expert_parallel_size)
    sizes = _sizes(facts.parameters, facts, settings, item)
    kept = activations(
        facts.model, facts.router, settings, facts.vocab_size, item, load.p99, in_cache=on_cpu and item == FP32
    )
    copy = tuple(_checkpoint_copy(settings, sizes))
    heap: tuple[Part, ...] = ()
    process = Part("process", ACCELERATOR_BYTES, "context, workspaces, channels: assumed")
    if on_cpu:
        kernels = kernel_bytes(facts.model, facts.router, settings, precision, load.p99)
        heap = (*copy, Part("kernels", kernels, "oneDNN: kernels x 0.57 MiB, measured"))
        more = ADAPTER_LIBRARY_BYTES + ADAPTER_HOLES_BYTES if isinstance(settings, AdapterTraining) else 0
        process = Part("process", PROCESS_BYTES + more, "interpreter, libraries, holes of adapters: measured")
    return Memory(
        states=tuple(_states(settings, sizes, on_cpu=on_cpu)),
        passes=tuple(_passes(facts, settings, sizes, kept, load.p99, on_cpu=on_cpu)),
        heap=heap,
        process=process,
        slack=HEAP_SLACK if on_cpu else 1.0,
        host=() if on_cpu else copy,
        load=load,
    )


def _sizes(parameters: Parameters, facts: Facts, settings: TrainingBase, item: int) -> _Sizes:
    ranks, group = settings.parallel.world_size, settings.parallel.expert_parallel_size
    experts = parameters.experts / group
    here = parameters.dense + experts
    gathered = (parameters.dense if ranks > 1 else 0) + (experts if ranks > group else 0)
    if isinstance(settings, AdapterTraining):
        adapters = count_adapter(facts.model, facts.router, settings)
        trained = adapters + (parameters.without_adapter if isinstance(settings, ReloraTraining) else 0)
        packed = 0.0 if settings.base_bits is None else parameters.attention + parameters.always + experts
        return _Sizes(here + adapters, trained / ranks, float(trained), trained, gathered, 0.0, item, packed)
    muon = settings.optimizer.kind == "muon"
    matrices = parameters.attention + parameters.experts + parameters.always if muon else 0
    return _Sizes(here, parameters.total / ranks, here, parameters.total, gathered, matrices / parameters.total, item)


def _states(settings: TrainingBase, sizes: _Sizes, *, on_cpu: bool) -> list[Part]:
    b, n = sizes.item, sizes.own
    moments = n * FP32 * (2 - sizes.matrices)
    how = "8 n: AdamW's two" if not sizes.matrices else f"8 n, but 4 n for Muon's {sizes.matrices:.0%}: one"
    common = [Part("fp32 weights of the optimizer", FP32 * n, "4 n"), Part("moments", moments, how)]
    if settings.parallel.zero_stage < 3:
        weights = Part("weights", b * (sizes.here - sizes.packed), "b N" if not sizes.packed else "b (N - packed)")
        return [weights, *([_packed(sizes)] if sizes.packed else []), *common]
    frozen = sizes.here - sizes.trained_here
    return [
        Part("weights", b * (n + frozen / settings.parallel.world_size), "b N / ranks"),
        *common,
        Part("gradients", b * n, "b n: flat, always there"),
        _bucket(settings, sizes, on_cpu=on_cpu),
    ]


def _bucket(settings: TrainingBase, sizes: _Sizes, *, on_cpu: bool) -> Part:
    """Under ZeRO 1 and 2 there is a second one where the exchange runs beside the backward pass: on accelerators."""
    twice = 1 if on_cpu or settings.parallel.zero_stage == 3 else 2
    size = sizes.item * min(REDUCE_BUCKET, sizes.trained) * twice
    return Part("exchange of gradients", float(size), f"{'' if twice == 1 else '2 '}b min(1e8, trained)")


def _packed(sizes: _Sizes) -> Part:
    """The frozen base in NF4 with double quantization (hpc/model/four_bit.py)."""
    return Part("base in four bits", sizes.packed * PACKED_BITS / 8, f"{PACKED_BITS:.3f} bits a packed weight")


def _unpacked(facts: Facts, settings: TrainingBase, item: int) -> float:
    """Bytes of the largest matrix that is unpacked for a product, one at a time."""
    if not isinstance(settings, AdapterTraining) or settings.base_bits is None:
        return 0.0
    model, router = facts.model, facts.router
    dense = model.dense_width(router) if model.num_dense_layers else 0
    feed_forward = model.hidden_size * max(model.expert_size * max(1, router.num_shared_experts), dense)
    return float(item * max(feed_forward, *(width * height for width, height in attention_matrices(model))))


def _checkpoint_copy(settings: TrainingBase, sizes: _Sizes) -> list[Part]:
    """The copy that a checkpoint in the background is written from: fp32 weights and moments of this rank."""
    if not settings.checkpoint_async:
        return []
    return [Part("copy for checkpoints", checkpoint_bytes(sizes.own, sizes.matrices), "4 n + moments")]


def checkpoint_bytes(trained: float, matrices: float = 0.0) -> float:
    """fp32 weights and moments of `trained` parameters, of which Muon has one moment for the part `matrices`."""
    return trained * FP32 * (3 - matrices)


def _passes(
    facts: Facts, settings: TrainingBase, sizes: _Sizes, kept: Activations, load: float, *, on_cpu: bool
) -> list[Part]:
    """load: of this rank's experts, for rows on their way between ranks and their gradients."""
    b, n, stage = sizes.item, sizes.own, settings.parallel.zero_stage
    accumulates = settings.gradient_accumulation_steps > 1
    bucket = 0.0 if stage == 3 else _bucket(settings, sizes, on_cpu=on_cpu).bytes
    live = b * min(sizes.gathered, LIVE_PARAMETERS) if stage == 3 else 0.0
    waiting = 0.0  # gradients of earlier micro-batches
    if stage < 3 and accumulates:
        waiting = b * sizes.trained_here + bucket if stage == 1 else b * n
    fills = stage < 3 and (accumulates or sizes.trained_here > REDUCE_BUCKET)
    during = max(waiting, bucket + (b * n if fills else 0.0))
    tokens = settings.batches.micro_batch_size * settings.batches.seq_len
    layer = sizes.trained_here / facts.model.num_layers
    head = facts.vocab_size * facts.model.hidden_size if sizes.trained > facts.parameters.embedding else 0
    rows = tokens * facts.router.top_k * facts.model.hidden_size * (settings.parallel.expert_parallel_size > 1)
    unpacked = _unpacked(facts, settings, sizes.item)
    working = unpacked + b * (layer + head + 3 * tokens * facts.model.hidden_size + (3 + 2 * load) * rows)
    gathered = "gathered weights + " if stage == 3 else ""
    whole_matrix = "one unpacked matrix + " if unpacked else ""
    whole = FP32 * facts.parameters.total
    passes = [
        Part("forward pass", waiting + live + unpacked + kept.kept + kept.rows,
             f"{gathered}{whole_matrix}waiting gradients + kept activations + logits of 512 rows"),
        Part("backward pass", during + live + kept.kept + kept.again + working,
             f"{gathered}{whole_matrix}bucket and gradients + kept and recomputed activations + gradients and rows on "
             "their way"),
        Part("update", b * n * (stage < 3) + FP32 * n, "gradients b n + their fp32 copy 4 n"),
        Part("evaluation", live + kept.logits + working,
             "8 V per token: all logits and their log-softmax in fp32"),
    ]  # fmt: skip
    if on_cpu and not isinstance(settings, AdapterTraining):
        passes.append(Part("writing the model", 2.0 * whole, "8 parameters: gathered, and as transformers' model"))
    return passes
