"""What a user says about training: parallelism, optimizer, schedule, checkpoints."""

from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from hpc.config.base import Frozen
from hpc.config.mixture import mixture_parts
from hpc.config.model import Balance, Model, Router


class Parallel(Frozen):
    """How one stage spreads over ranks: DeepSpeed ZeRO data parallelism, with expert parallelism inside it."""

    nodes: PositiveInt = 1
    """Nodes of the job."""

    ranks_per_node: PositiveInt = 1
    """Worker processes per node; one per accelerator, or one per core on a CPU machine."""

    expert_parallel_size: PositiveInt = 1
    """Ranks that share one set of experts. Must divide the number of ranks and the number of experts."""

    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage: 1 shards the optimizer states, 2 the gradients too, 3 the weights too. Stage 0 is not
    offered: with expert parallelism its gradient clipping is wrong."""

    @property
    def world_size(self) -> int:
        """Ranks of the stage."""
        return self.nodes * self.ranks_per_node

    @model_validator(mode="after")
    def _check_expert_parallel(self) -> Self:
        if self.world_size % self.expert_parallel_size:
            raise ValueError(
                f"{self.world_size} ranks do not split into groups of expert_parallel_size = "
                f"{self.expert_parallel_size}: choose a divisor of {self.world_size}"
            )
        return self


class Optimizer(Frozen):
    """Update rule. Weight decay is for the matrices of the blocks and the head: norms, biases, and the embedding
    (as in OLMo 2, arXiv:2501.00656) are not decayed."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`adamw`: arXiv:1711.05101. `muon`: orthogonalised momentum for the matrices of the blocks, each expert for itself
    (Jordan et al. 2024; arXiv:2502.16982), AdamW for embedding, head, routers and norms; half the optimizer memory of
    the matrices, about 2 % more FLOPs. Muon's updates have a size of their own, so gradients are not clipped then."""

    lr: PositiveFloat
    """Peak learning rate."""

    muon_lr: PositiveFloat = 0.02
    """Peak learning rate of the matrices that `muon` updates; it follows the same schedule."""

    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Momentum of `muon` (Nesterov)."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""

    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""

    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of the matrices."""

    gradient_clipping: PositiveFloat = 1.0
    """Largest global gradient norm."""


class Schedule(Frozen):
    """Learning rate over steps."""

    kind: Literal["cosine", "wsd", "constant", "jagged_cosine"] = "cosine"
    """`cosine`: warm-up, then a half cosine; `wsd`: warm-up, stable, linear decay (arXiv:2404.06395); `constant`;
    `jagged_cosine`: a cosine that falls to zero and warms up again every `restart_every_steps` (ReLoRA,
    arXiv:2307.05695)."""

    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from zero."""

    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Last part of all steps in which `wsd` decays."""

    min_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""

    restart_every_steps: PositiveInt | None = None
    """Steps between two restarts of `jagged_cosine`."""

    restart_warmup_steps: NonNegativeInt = 10
    """Steps of linear warm-up after a restart, back to the cosine."""

    @model_validator(mode="after")
    def _check_restarts(self) -> Self:
        if (self.kind == "jagged_cosine") != (self.restart_every_steps is not None):
            raise ValueError(
                f"kind = {self.kind} with restart_every_steps = {self.restart_every_steps}: jagged_cosine needs it, "
                "the others have no restarts"
            )
        if self.restart_every_steps is not None and self.restart_warmup_steps >= self.restart_every_steps:
            raise ValueError(
                f"restart_warmup_steps = {self.restart_warmup_steps} fills restart_every_steps = "
                f"{self.restart_every_steps}: try {self.restart_every_steps // 10}"
            )
        return self


class Batches(Frozen):
    """How many tokens one optimizer step sees."""

    seq_len: PositiveInt
    """Tokens per sequence; also the model's context length when it is built here."""

    micro_batch_size: PositiveInt
    """Sequences one rank holds in memory at a time."""

    tokens_per_step: PositiveInt
    """Tokens of one optimizer step over all ranks; gradient accumulation follows from it."""

    document_masking: bool = True
    """Whether attention stays inside a document: positions start again at 0 at every document start in a sequence. Off,
    a token also sees the end of the document before its own, as text that has nothing to do with it."""


class HangBounds(Frozen):
    """Seconds a rank may spend in a section without any progress before all ranks write down their stacks and the
    attempt ends with exit code 11. A step's clock starts again with every micro-batch, an evaluation's with every pass,
    and it stands still while the process is suspended."""

    start_s: PositiveFloat = 1800.0
    """Joining the other ranks, building or loading the model and the engine, reading a checkpoint."""

    step_s: PositiveFloat = 300.0
    """One micro-batch, or the update of the weights."""

    checkpoint_s: PositiveFloat = 1800.0
    """Writing and hashing one checkpoint."""

    evaluate_s: PositiveFloat = 300.0
    """One micro-batch of held-out text."""

    finish_s: PositiveFloat = 3600.0
    """After the last step: writing and hashing the model."""

    @property
    def longest_s(self) -> float:
        """The largest of them."""
        return max(self.start_s, self.step_s, self.checkpoint_s, self.evaluate_s, self.finish_s)


class Health(Frozen):
    """What is watched while a stage trains, and what happens then."""

    on_bad_step: Literal["skip", "roll_back"] = "skip"
    """When the loss or the gradient norm is not finite on any rank, or the loss spikes: `skip` drops the update on all
    ranks and goes on; `roll_back` returns to the newest checkpoint and goes on past the data read since (PaLM,
    arXiv:2204.02311, section 5.1)."""

    window: PositiveInt = 128
    """Good steps that a loss is compared with, and the steps that `max_skipped` counts over. No step is a spike before
    there are so many."""

    spike_sigma: PositiveFloat = 6.0
    """A loss above mean + spike_sigma x standard deviation of the window is a spike; 1e9 turns spikes off."""

    max_skipped: NonNegativeInt = 8
    """Updates that may be skipped in any `window` steps; one more ends the stage."""

    max_rollbacks: NonNegativeInt = 3
    """Returns to a checkpoint in the whole stage; one more ends it."""

    rehearse: bool = True
    """One forward and backward pass before the first step of an attempt, whose gradients are thrown away: memory that
    does not suffice shows at once. Costs one micro-batch; changes no bit of the run."""

    report_every_steps: PositiveInt = 100
    """Steps between comparisons of the ranks' step times. Costs nothing: they ride on the word that ranks exchange
    anyway before every update."""

    probe_every_steps: NonNegativeInt = 500
    """Steps between searches for silent corruption: all ranks compute the same micro-batch and compare every bit of the
    loss, the logits and the weights they share. Costs a forward pass (a third of a micro-batch) and a pass over the
    weights each time; 0 turns it off."""

    hang: HangBounds = HangBounds()
    """How long nothing may happen."""


class TrainingBase(Frozen):
    """What every training stage has in common; one loop serves them all."""

    batches: Batches
    """Sequence length, micro-batch, and tokens per step."""

    mixture: dict[str, PositiveFloat] = {}
    """Weight of each needed stage that produces tokens, such as `{text-a: 0.7, text-b: 0.3}`: its part of all
    sequences, kept exactly at any step. Left out where only one is needed. A source that runs out starts again."""

    steps: PositiveInt
    """Optimizer steps of the stage."""

    optimizer: Optimizer
    """Update rule."""

    schedule: Schedule = Schedule()
    """Learning-rate schedule."""

    parallel: Parallel = Parallel()
    """Ranks, expert parallelism, ZeRO stage."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute precision; `auto` is bf16 on accelerators and fp32 on CPUs, where bf16 is slower."""

    expert_compute: Literal["grouped_mm", "loop", "megablocks"] = "grouped_mm"
    """What multiplies the experts' matrices: `grouped_mm` is torch's grouped kernel; `loop` one product per expert, the
    reference; `megablocks` (arXiv:2211.15841) needs an NVIDIA GPU and its own installation."""

    attention_kernel: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel: `sdpa` leaves the choice to torch; `auto` does so too, but on CPUs with AVX-512 takes blocks
    of our own for long causal sequences; flash_attention_2 needs its package."""

    recompute: Literal["none", "attention", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping: `attention`: those of the attention blocks,
    cheap and without a second exchange between experts' ranks; `full`: whole blocks, exchange included, about a third
    more FLOPs for the least memory."""

    compile: bool = False
    """Whether torch.compile makes kernels of the attention blocks: a minute at start, a few per cent faster steps. The
    MoE layers stay as they are, since their shapes change with every batch."""

    checkpoint_every_steps: PositiveInt = 100
    """Steps between checkpoints; a kill loses at most this many."""

    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that stay on disk while the stage runs. Each takes 12 bytes per parameter."""

    keep_every_steps: PositiveInt | None = None
    """Checkpoints of steps that are multiples of this stay for good, also after the stage: a history to go back to, to
    export or to study. A multiple of checkpoint_every_steps."""

    checkpoint_async: bool = True
    """Write checkpoints while training goes on. Costs one copy of weights and optimizer states in host memory (12 bytes
    per parameter, spread over the ranks); without it training stands still until a checkpoint is on the disk."""

    evaluate_every_steps: PositiveInt = 100
    """Steps between measurements of the held-out loss."""

    evaluate_tokens: PositiveInt = 16384
    """Held-out tokens of one measurement during training (the final one uses all of them)."""

    health: Health = Health()
    """Bad steps, hangs, slow ranks and silent corruption."""

    deepspeed: dict[str, object] = Field(default_factory=dict)
    """Keys laid over the DeepSpeed configuration we write, for experts; shown in the plan."""

    @field_validator("mixture")
    @classmethod
    def _check_mixture(cls, mixture: dict[str, float]) -> dict[str, float]:
        if mixture:
            mixture_parts(list(mixture.values()))
        return mixture

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        ranks = self.parallel.world_size
        one_pass = ranks * self.batches.micro_batch_size * self.batches.seq_len
        wanted = self.batches.tokens_per_step
        if wanted % one_pass:
            below = max(1, wanted // one_pass) * one_pass
            raise ValueError(
                f"tokens_per_step = {wanted:,} is not a multiple of one pass over {ranks} ranks "
                f"({ranks} x {self.batches.micro_batch_size} x {self.batches.seq_len} = {one_pass:,}): try {below:,}"
            )
        if self.keep_every_steps is not None and self.keep_every_steps % self.checkpoint_every_steps:
            every = self.checkpoint_every_steps
            raise ValueError(
                f"keep_every_steps = {self.keep_every_steps} is not a multiple of checkpoint_every_steps = {every}: "
                f"try {-(-self.keep_every_steps // every) * every}"
            )
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps = {self.schedule.warmup_steps} leaves nothing of steps = {self.steps}: "
                f"try {max(0, self.steps // 20)}"
            )
        return self

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per rank and step."""
        ranks = self.parallel.world_size
        return self.batches.tokens_per_step // (ranks * self.batches.micro_batch_size * self.batches.seq_len)


class Training(TrainingBase):
    """Pretraining from random weights."""

    model: Model
    """Shape of the model."""

    router: Router
    """Experts per layer and how tokens reach them."""

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        experts, size = self.router.num_experts, self.parallel.expert_parallel_size
        if experts % size:
            raise ValueError(
                f"{experts} experts do not split over expert_parallel_size = {size}: choose a divisor of {experts}"
            )
        router, is_deepseek = self.router, self.model.architecture == "deepseek_v3"
        if is_deepseek and router.num_shared_experts == 0:
            raise ValueError("router.num_shared_experts = 0, deepseek_v3 has at least one: set it to 1")
        defaults = Router(num_experts=router.num_experts, top_k=router.top_k)
        for key in ("num_shared_experts", "num_groups", "top_groups", "scaling_factor", "bias_update_rate"):
            if not is_deepseek and getattr(router, key) != getattr(defaults, key):
                raise ValueError(
                    f"router.{key} = {getattr(router, key)} has no place in {self.model.architecture}: leave it out, "
                    "or take architecture: deepseek_v3"
                )
        return self


class Finetuning(TrainingBase):
    """Training all weights of a model that exists: continued pretraining, upcycling, or a task."""

    balance: Balance = Balance()
    """What keeps the load of its experts even; nothing to a dense model."""


class ExpertChoice(Frozen):
    """Which experts get adapters; the others stay as they are, and their part of an adapter stays zero."""

    top_loaded: float | None = Field(default=None, gt=0, le=1)
    """Part of each layer's experts, those that most tokens went to by the base's router passport."""

    named: dict[NonNegativeInt, list[NonNegativeInt]] | None = None
    """Layer -> experts; layers that are not named keep theirs."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.top_loaded is None) == (self.named is None):
            raise ValueError("experts are chosen by top_loaded or named: give exactly one of the two")
        return self


class AdapterTraining(TrainingBase):
    """Fine-tuning low-rank adapters on a frozen model (LoRA, arXiv:2106.09685)."""

    rank: PositiveInt = 8
    """Rank of each adapter; on experts it is per expert, so memory grows with their number."""

    alpha: PositiveFloat = 16.0
    """Adapters are scaled by alpha / rank."""

    attention: bool = True
    """Adapt the query, key, value and output projections."""

    experts: bool = True
    """Adapt the experts' matrices, or the feed-forward matrices of a dense model."""

    expert_choice: ExpertChoice | None = None
    """Adapt only some experts; all of them when left out."""

    base_bits: Literal[4] | None = None
    """Bits of the frozen matrices of attention and feed-forward blocks, experts included; null is full precision. 4 is
    NF4 with double quantization (QLoRA, arXiv:2305.14314), 4.13 bits a weight in memory: each rank packs its part while
    it reads it, and unpacks one matrix at a time, in the forward and in the backward pass: 15, 4 and 2 % of a step on a
    CPU at 256, 1,024 and 4,096 tokens in a micro-batch (measured 2026-11-25). Routers, norms, embeddings and the head
    stay as they are. The adapters learn beside the rounded base, and `merge` adds them
    to the one in full precision: close to what was trained, not the same. Needs bitsandbytes (extra `qlora`)."""

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if not (self.attention or self.experts):
            raise ValueError("attention and experts are both false, so nothing would be trained: set one to true")
        return self

    @model_validator(mode="after")
    def _check_base(self) -> Self:
        if self.base_bits is None:
            return self
        if self.parallel.zero_stage == 3:
            raise ValueError(
                f"parallel.zero_stage = 3 splits weights over ranks, which a base of base_bits = {self.base_bits} "
                "cannot be: take zero_stage 2 (expert_parallel_size splits the experts)"
            )
        if self.expert_compute == "megablocks":
            raise ValueError(
                f"expert_compute = megablocks multiplies all experts at once, base_bits = {self.base_bits} unpacks "
                "one at a time: take grouped_mm"
            )
        if self.compile:
            raise ValueError(
                f"compile = true cannot make kernels of matrices that base_bits = {self.base_bits} unpacks on each "
                "use: set compile to false"
            )
        return self


class ReloraTraining(AdapterTraining):
    """Pretraining by low-rank updates that are merged and begun anew (ReLoRA, arXiv:2307.05695). What has no adapter
    (embeddings, head, routers, norms) is trained as it is. `schedule.kind: jagged_cosine` says when cycles end.

    The paper starts from a model that was trained in full for a quarter of its steps: let the stage need one."""

    rank: PositiveInt = 128
    """Rank of each adapter; on experts it is per expert. The update of n cycles has up to n times this rank."""

    alpha: PositiveFloat = 32.0
    """Adapters are scaled by alpha / rank."""

    prune: Literal["zero", "random", "magnitude"] = "magnitude"
    """What the optimizer forgets about the adapters at the end of a cycle: all, a random part, or the smallest part of
    each moment."""

    prune_ratio: float = Field(default=0.9, ge=0, le=1)
    """How large that part is, for random and magnitude."""

    balance: Balance = Balance()
    """What keeps the load of the experts even; nothing to a dense model."""

    @model_validator(mode="after")
    def _check_cycles(self) -> Self:
        every = self.schedule.restart_every_steps
        if self.base_bits is not None:
            raise ValueError(
                f"base_bits = {self.base_bits} rounds the base, and relora merges its adapters into it at every "
                "restart: leave base_bits out, or take a lora stage"
            )
        if every is None:
            raise ValueError(
                "a relora stage restarts by its schedule: set schedule.kind to jagged_cosine, with restart_every_steps"
            )
        if self.steps % every:
            raise ValueError(
                f"steps = {self.steps} is not a multiple of schedule.restart_every_steps = {every}: try "
                f"{-(-self.steps // every) * every}"
            )
        if self.optimizer.kind != "adamw":
            raise ValueError("optimizer.kind = muon keeps no moments that relora could prune: take adamw")
        return self
