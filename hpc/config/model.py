"""What a user says about a model built here: its shape, and how its routers choose experts."""

from typing import Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from hpc.config.base import Frozen


class LatentAttention(Frozen):
    """Multi-head latent attention of DeepSeek-V3 (arXiv:2412.19437, section 2.1.1): keys and values from one small
    latent vector per token, which is all that a cache has to hold."""

    kv_rank: PositiveInt
    """Width of the latent vector of keys and values."""

    query_rank: PositiveInt | None = None
    """Width of the latent vector of queries; null: queries come from the residual stream in one product."""

    nope_head_dim: PositiveInt
    """Width of a head's queries and keys without position."""

    rope_head_dim: PositiveInt
    """Width of a head's queries and keys with rotary position; even. The keys' part is shared by all heads."""

    value_head_dim: PositiveInt
    """Width of a head's values."""

    @model_validator(mode="after")
    def _check_rope(self) -> Self:
        if self.rope_head_dim % 2:
            raise ValueError(
                f"rope_head_dim = {self.rope_head_dim} is odd, rotations take pairs: try {self.rope_head_dim + 1}"
            )
        return self


class Model(Frozen):
    """Shape of a mixture-of-experts transformer, built from a transformers architecture with random weights."""

    architecture: Literal["mixtral", "olmoe", "qwen3_moe", "deepseek_v3"] = "qwen3_moe"
    """transformers model type. Mixtral: arXiv:2401.04088; OLMoE: arXiv:2409.02060; Qwen3-MoE: arXiv:2505.09388;
    DeepSeek-V3: arXiv:2412.19437 (latent attention, sigmoid scores, shared experts, bias balancing). The scores are the
    architecture's own (softmax in the other three), so that plain transformers computes the same model."""

    hidden_size: PositiveInt
    """Width of the residual stream. Multiples of 256 keep every later quantization format open."""

    num_layers: PositiveInt
    """Transformer blocks, each with one attention and one MoE layer."""

    num_attention_heads: PositiveInt
    """Query heads per layer; must divide hidden_size."""

    num_key_value_heads: PositiveInt | None = None
    """Key/value heads per layer (grouped-query attention); as many as query heads when left out."""

    expert_size: PositiveInt
    """Intermediate width of one expert (SwiGLU: three matrices of hidden_size x expert_size). Fine-grained experts
    (DeepSeekMoE, arXiv:2401.06066): more of them, narrower, with a larger top_k."""

    num_dense_layers: NonNegativeInt = 0
    """First layers with one dense SwiGLU in place of experts; deepseek_v3 only."""

    dense_size: PositiveInt | None = None
    """Intermediate width of the dense layers; null: as wide as the experts that one token uses."""

    latent_attention: LatentAttention | None = None
    """deepseek_v3 only, where null takes kv_rank = hidden_size / 4 and head widths from hidden_size / heads."""

    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""

    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the random initial weights."""

    initialization: Literal["normal", "depth_scaled"] = "normal"
    """`normal`: all matrices alike. `depth_scaled`: the matrices that write into the residual stream (attention output,
    down projections) start smaller by 1 / sqrt(2 x num_layers), so that its variance does not grow with depth (GPT-2;
    Megatron-LM, arXiv:1909.08053)."""

    @model_validator(mode="after")
    def _check_architecture(self) -> Self:
        if self.architecture == "deepseek_v3":
            if self.num_dense_layers >= self.num_layers:
                raise ValueError(
                    f"num_dense_layers = {self.num_dense_layers} leaves no MoE layer of {self.num_layers}: "
                    f"try {self.num_layers - 1}"
                )
            return self
        for key in ("num_dense_layers", "dense_size", "latent_attention"):
            if getattr(self, key):
                raise ValueError(f"{key} belongs to deepseek_v3, {self.architecture} has no such thing: leave it out")
        return self

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

    @property
    def latent(self) -> LatentAttention:
        """Latent attention, after the defaults."""
        half = max(2, self.head_dim // 4 * 2)
        return self.latent_attention or LatentAttention(
            kv_rank=max(1, self.hidden_size // 4),
            nope_head_dim=max(1, self.head_dim - half),
            rope_head_dim=half,
            value_head_dim=self.head_dim,
        )

    def dense_width(self, router: "Router") -> int:
        """Width of the dense layers: as stated, or that of the experts one token uses."""
        return self.dense_size or self.expert_size * (router.top_k + router.num_shared_experts)


class Balance(Frozen):
    """What keeps the load of experts even while a model trains.

    Source: auxiliary loss as in Switch Transformer (arXiv:2101.03961, eq. 4); a bias as in Wang et al. 2024
    (arXiv:2408.15664).
    """

    aux_loss: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss, computed per layer and averaged over layers; 0 turns it off. Counts are taken
    over all ranks."""

    aux_loss_over: Literal["micro_batch", "step"] = "micro_batch"
    """Tokens whose counts the balancing loss sees: those of one micro-batch of all ranks, or all of the step so far
    (the global batch, arXiv:2501.11873), which lets experts specialise more. The same without accumulation."""

    bias_update_rate: NonNegativeFloat = 0.0
    """Balancing without a loss (arXiv:2408.15664): after each step the bias of an expert, which only the choice of
    experts sees, goes up by this much when the expert had fewer tokens than the mean, and down when it had more. 0.001
    is usual, 0 turns it off. deepseek_v3 only: the other architectures have no place to keep the bias."""

    z_loss: NonNegativeFloat = 0.0
    """Weight of the router z-loss (ST-MoE, arXiv:2202.08906), averaged over layers; 0.001 is usual, 0 turns it off."""


class Router(Balance):
    """How one MoE layer assigns tokens to experts: scores in fp32, top-k choice, no token ever dropped.

    Source: Shazeer et al. 2017 (arXiv:1701.06538).
    """

    num_experts: PositiveInt
    """Routed experts in each layer, counted over all ranks."""

    top_k: PositiveInt = 2
    """Experts per token. Active FLOPs and all-to-all bytes both grow with it."""

    num_shared_experts: NonNegativeInt = 0
    """Experts that every token uses, beside the routed ones, as one SwiGLU of this many times expert_size
    (arXiv:2401.06066). deepseek_v3 only, where it is at least 1."""

    num_groups: PositiveInt = 1
    """Groups of experts for node-limited routing; deepseek_v3 only. A group's score is the sum of its two best."""

    top_groups: PositiveInt = 1
    """Groups that one token may use."""

    scaling_factor: PositiveFloat = 1.0
    """Factor on the routed experts' output; deepseek_v3 only (2.5 in the original)."""

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.num_groups == 1 == self.top_groups:
            return self
        if self.num_experts % self.num_groups or self.num_experts // self.num_groups < 2:
            raise ValueError(
                f"{self.num_experts} experts do not make {self.num_groups} groups of at least 2: choose a divisor of "
                f"{self.num_experts // 2}"
            )
        if self.top_groups > self.num_groups or self.top_k > self.top_groups * (self.num_experts // self.num_groups):
            raise ValueError(
                f"top_groups = {self.top_groups} of {self.num_groups} groups do not hold top_k = {self.top_k} experts: "
                f"raise top_groups, to at most {self.num_groups}"
            )
        return self

    @model_validator(mode="after")
    def _check_top_k(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}, but the layer has {self.num_experts} experts: choose 1 to {self.num_experts}"
            )
        return self
