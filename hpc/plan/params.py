"""Parameter counts from a model's shape, equal to what transformers builds (a test compares).

Shape letters: V vocabulary, H hidden, L layers, E experts, K experts per token, I expert width, D head width.
"""

from dataclasses import dataclass

from hpc.config import AdapterTraining, Model, Router


@dataclass(frozen=True)
class Parameters:
    """Parameters by group."""

    embedding: int
    """Input embedding, V x H. The head has as many and is counted in `head`."""
    head: int
    attention: int
    router: int
    experts: int
    norms: int
    active_experts: int
    """Expert parameters that one token uses: K of E."""
    always: int = 0
    """Shared experts and dense layers: SwiGLU that every token uses."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self.attention + self.router + self.experts + self.norms + self.always

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return self.total - self.experts + self.active_experts

    @property
    def dense(self) -> int:
        """All but the experts: what every rank of an expert-parallel group holds."""
        return self.total - self.experts

    @property
    def without_adapter(self) -> int:
        """Parameters that no adapter stands beside, which ReLoRA trains as they are."""
        return self.embedding + self.head + self.router + self.norms

    @property
    def active_matrices(self) -> int:
        """Parameters of matrix products per token: head, attention, router, active experts; no embedding, no norms."""
        return self.head + self.attention + self.router + self.active_experts + self.always


def count(model: Model, router: Router, vocab_size: int) -> Parameters:
    """Count a model's parameters. SwiGLU experts have three H x I matrices; nothing has a bias."""
    h, layers, moe_layers = model.hidden_size, model.num_layers, model.num_layers - model.num_dense_layers
    attention, head_norms = _attention(model)
    expert = 3 * h * model.expert_size
    return Parameters(
        embedding=vocab_size * h,
        head=vocab_size * h,
        attention=layers * attention,
        router=moe_layers * router.num_experts * h,
        experts=moe_layers * router.num_experts * expert,
        norms=layers * (2 * h + head_norms) + h,
        active_experts=moe_layers * router.top_k * expert,
        always=moe_layers * router.num_shared_experts * expert
        + model.num_dense_layers * 3 * h * model.dense_width(router),
    )


def attention_parameters(model: Model) -> int:
    """Parameters of the matrices of one attention block."""
    return _attention(model)[0]


def _attention(model: Model) -> tuple[int, int]:
    """Parameters of one attention block: matrices, and norms of queries, keys and latent vectors."""
    matrices = sum(width * height for width, height in attention_matrices(model))
    if model.architecture == "deepseek_v3":
        return matrices, model.latent.kv_rank + (model.latent.query_rank or 0)
    d, heads = model.head_dim, model.num_attention_heads
    q, kv = heads * d, model.kv_heads * d
    # OLMoE normalises whole queries and keys, Qwen3 those of each head, Mixtral neither.
    return matrices, {"olmoe": q + kv, "qwen3_moe": 2 * d, "mixtral": 0}[model.architecture]


def attention_matrices(model: Model) -> list[tuple[int, int]]:
    """Width in and out of each matrix of one attention block."""
    h, d, heads = model.hidden_size, model.head_dim, model.num_attention_heads
    if model.architecture == "deepseek_v3":
        latent = model.latent
        query = heads * (latent.nope_head_dim + latent.rope_head_dim)
        queries = [(h, latent.query_rank), (latent.query_rank, query)] if latent.query_rank else [(h, query)]
        keys_values = heads * (latent.nope_head_dim + latent.value_head_dim)
        down = (h, latent.kv_rank + latent.rope_head_dim)
        return [*queries, down, (latent.kv_rank, keys_values), (heads * latent.value_head_dim, h)]
    q, kv = heads * d, model.kv_heads * d
    return [(h, q), (h, kv), (h, kv), (q, h)]


def count_adapter(model: Model, router: Router, settings: AdapterTraining) -> int:
    """Parameters of LoRA adapters: rank x (inputs + outputs) for each adapted matrix; on experts for each expert."""
    h, i, r = model.hidden_size, model.expert_size, settings.rank
    attention = r * sum(width + height for width, height in attention_matrices(model))
    experts = (model.num_layers - model.num_dense_layers) * router.num_experts * r * ((h + 2 * i) + (i + h))
    return settings.attention * model.num_layers * attention + settings.experts * experts
