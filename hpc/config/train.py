"""What a user says about training: model shape, routing, parallelism, optimizer, schedule, checkpoints."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from hpc.config.base import Frozen


class Model(Frozen):
    """Shape of a mixture-of-experts transformer, built from a transformers architecture with random weights."""

    architecture: Literal["mixtral", "olmoe", "qwen3_moe"] = "qwen3_moe"
    """transformers model type. Mixtral: arXiv:2401.04088; OLMoE: arXiv:2409.02060; Qwen3-MoE: arXiv:2505.09388."""

    hidden_size: PositiveInt
    """Width of the residual stream. Multiples of 256 keep every later quantization format open."""

    num_layers: PositiveInt
    """Transformer blocks, each with one attention and one MoE layer."""

    num_attention_heads: PositiveInt
    """Query heads per layer; must divide hidden_size."""

    num_key_value_heads: PositiveInt | None = None
    """Key/value heads per layer (grouped-query attention); as many as query heads when left out."""

    expert_size: PositiveInt
    """Intermediate width of one expert (SwiGLU: three matrices of hidden_size x expert_size)."""

    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""

    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the random initial weights."""

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split over num_attention_heads {self.num_attention_heads}: "
                f"choose a divisor of {self.hidden_size}"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads do not share {self.kv_heads} key/value heads evenly: "
                f"choose a divisor of {self.num_attention_heads}"
            )
        if self.architecture == "olmoe" and self.kv_heads != self.num_attention_heads:
            raise ValueError(
                "olmoe with fewer key/value than query heads cannot be loaded by llama.cpp: "
                f"set num_key_value_heads to {self.num_attention_heads}, or take qwen3_moe"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads, after the default."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class Router(Frozen):
    """How one MoE layer assigns tokens to experts: softmax scores, top-k choice, no token dropped.

    Source: Shazeer et al. 2017 (arXiv:1701.06538); auxiliary loss as in Switch Transformer (arXiv:2101.03961, eq. 4).
    """

    num_experts: PositiveInt
    """Routed experts in each layer, counted over all ranks."""

    top_k: PositiveInt = 2
    """Experts per token. Active FLOPs and all-to-all bytes both grow with it."""

    aux_loss: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss, averaged over layers; 0 turns it off. Counts are taken over all ranks."""

    z_loss: NonNegativeFloat = 0.0
    """Weight of the router z-loss (ST-MoE, arXiv:2202.08906), averaged over layers; 0.001 is usual, 0 turns it off."""

    @model_validator(mode="after")
    def _check_top_k(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}, but the layer has {self.num_experts} experts: choose 1 to {self.num_experts}"
            )
        return self


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
    """AdamW (arXiv:1711.05101). Norms and biases are not decayed."""

    lr: PositiveFloat
    """Peak learning rate."""

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

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """`cosine`: warm-up, then a half cosine; `wsd`: warm-up, stable, linear decay (arXiv:2404.06395); `constant`."""

    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from zero."""

    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Last part of all steps in which `wsd` decays."""

    min_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""


class Batches(Frozen):
    """How many tokens one optimizer step sees."""

    seq_len: PositiveInt
    """Tokens per sequence; also the model's context length when it is built here."""

    micro_batch_size: PositiveInt
    """Sequences one rank holds in memory at a time."""

    tokens_per_step: PositiveInt
    """Tokens of one optimizer step over all ranks; gradient accumulation follows from it."""


class TrainingBase(Frozen):
    """What every training stage has in common; one loop serves them all."""

    batches: Batches
    """Sequence length, micro-batch, and tokens per step."""

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

    checkpoint_every_steps: PositiveInt = 100
    """Steps between checkpoints; a kill loses at most this many."""

    keep_checkpoints: PositiveInt = 2
    """Newest verified checkpoints that stay on disk while the stage runs."""

    evaluate_every_steps: PositiveInt = 100
    """Steps between measurements of the held-out loss."""

    evaluate_tokens: PositiveInt = 16384
    """Held-out tokens of one measurement during training (the final one uses all of them)."""

    deepspeed: dict[str, object] = Field(default_factory=dict)
    """Keys laid over the DeepSpeed configuration we write, for experts; shown in the plan."""

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
    """Adapt the experts' matrices (all of them)."""

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if not (self.attention or self.experts):
            raise ValueError("attention and experts are both false, so nothing would be trained: set one to true")
        if self.parallel.expert_parallel_size != 1:
            raise ValueError(
                f"expert_parallel_size = {self.parallel.expert_parallel_size} is for pretraining; "
                "adapters train data-parallel over whole experts: set it to 1"
            )
        return self
