"""What step time needs to know of a model: its products by shape, as plain numbers.

Wider than hpc.config.Model, because published runs train models that are not built here: dense ones, hybrids with
state-space layers, windows, latent attention, experts that work in a narrower space. `of_ours` makes one from a
configuration of ours.

Shape letters: H hidden, V vocabulary, E experts, K experts per token, I intermediate width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpc.config import Model, Router


@dataclass(frozen=True)
class Shape:
    """A decoder-only model. Counts are of layers; widths of one layer."""

    hidden: int
    vocab: int
    attention_layers: int
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 128
    """Width of a head's queries and keys."""
    value_dim: int | None = None
    """Width of a head's values; as head_dim when None."""
    query_rank: int = 0
    """Latent width of queries (multi-head latent attention); 0: straight from the residual stream."""
    kv_rank: int = 0
    """Latent width of keys and values; 0: ordinary attention."""
    rope_dim: int = 0
    """Part of a latent head's width with position, shared by all heads' keys."""
    windowed_layers: int = 0
    window: int = 0
    """Tokens that a windowed layer looks back."""
    dense_layers: int = 0
    dense_size: int = 0
    gated: bool = True
    """Three matrices per feed-forward (SwiGLU) rather than two."""
    moe_layers: int = 0
    experts: int = 1
    top_k: int = 1
    expert_size: int = 0
    shared_size: int = 0
    """Width of all shared experts together."""
    latent: int = 0
    """Width in which the experts work when it is not H (two more products per layer)."""
    mamba_layers: int = 0
    mamba_inner: int = 0
    mamba_state: int = 0
    mamba_groups: int = 0
    mamba_heads: int = 0
    extra_heads: int = 0
    """Multi-token prediction: each adds a block (counted in the layers), a product of 2H x H and the head again."""
    tied: bool = False

    @property
    def values(self) -> int:
        """Width of a head's values."""
        return self.value_dim or self.head_dim

    @property
    def matrices(self) -> int:
        """Matrices of one feed-forward."""
        return 3 if self.gated else 2

    def attention_products(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the products of one attention layer."""
        h, q = self.hidden, self.heads * self.head_dim
        out = (self.heads * self.values, h)
        if not self.kv_rank:
            return [(h, q + self.kv_heads * (self.head_dim + self.values)), out]
        nope = self.head_dim - self.rope_dim
        queries = [(h, self.query_rank), (self.query_rank, q)] if self.query_rank else [(h, q)]
        keys = [(h, self.kv_rank + self.rope_dim), (self.kv_rank, self.heads * (nope + self.values))]
        return [*queries, *keys, out]

    def mamba_products(self) -> list[tuple[int, int]]:
        """Input and output projection of one state-space layer (Mamba 2, arXiv:2405.21060)."""
        if not self.mamba_layers:
            return []
        inner = 2 * self.mamba_inner + 2 * self.mamba_groups * self.mamba_state + self.mamba_heads
        return [(self.hidden, inner), (self.mamba_inner, self.hidden)]

    def feed_forward_products(self, width: int, inputs: int | None = None) -> list[tuple[int, int]]:
        """Products of a feed-forward; gate and up are one product, as frameworks run them."""
        inputs = inputs or self.hidden
        return [(inputs, (self.matrices - 1) * width), (width, inputs)] if width else []

    def expert_products(self) -> list[tuple[int, int]]:
        """Products of one routed expert."""
        return self.feed_forward_products(self.expert_size, self.latent or self.hidden) if self.moe_layers else []

    def always_products(self) -> list[tuple[int, int]]:
        """Products that every token takes in one MoE layer: shared experts, router, latent projections."""
        if not self.moe_layers:
            return []
        found = [*self.feed_forward_products(self.shared_size), (self.hidden, self.experts)]
        if self.latent:
            found += [(self.hidden, self.latent), (self.latent, self.hidden)]
        return found

    def head_products(self) -> list[tuple[int, int]]:
        """The head, once for each prediction, and the joining product of further predictions."""
        return [(self.hidden, self.vocab)] * (1 + self.extra_heads) + [
            (2 * self.hidden, self.hidden)
        ] * self.extra_heads

    @property
    def expert_parameters(self) -> int:
        """Parameters of all routed experts."""
        return self.moe_layers * self.experts * _size(self.expert_products())

    @property
    def dense_parameters(self) -> int:
        """All other parameters of products, with the input embedding."""
        layers = (
            self.attention_layers * _size(self.attention_products())
            + self.mamba_layers * _size(self.mamba_products())
            + self.dense_layers * _size(self.feed_forward_products(self.dense_size))
            + self.moe_layers * _size(self.always_products())
        )
        return layers + _size(self.head_products()) + (0 if self.tied else self.hidden * self.vocab)

    @property
    def active_matrices(self) -> int:
        """Parameters of products that one token takes."""
        embedding = 0 if self.tied else self.hidden * self.vocab
        routed = self.moe_layers * self.top_k * _size(self.expert_products())
        return self.dense_parameters - embedding + routed

    def attention_flops(self, seq: int, windows: bool = True) -> float:
        """Forward FLOPs per token of scores and weighted values, over the keys that a causal mask and windows leave."""
        per_key = 2.0 * self.heads * (self.head_dim + self.values)
        windowed = self.windowed_layers if windows else 0
        full = (self.attention_layers - windowed) * (seq / 2)
        return per_key * (full + windowed * min(self.window, seq / 2))

    def state_flops(self) -> float:
        """Forward FLOPs per token of the state-space scans: state update and readout."""
        return 7.0 * self.mamba_layers * self.mamba_inner * self.mamba_state

    def training_flops(self, seq: int, causal: bool = True) -> float:
        """Model FLOPs per token, forward and backward: 6 x active matrices plus attention.

        `causal=False` counts attention as if there were no mask (PaLM, arXiv:2204.02311, appendix B).
        """
        attention = self.attention_flops(seq) * (1 if causal else 2)
        return 6.0 * self.active_matrices + 3 * (attention + self.state_flops())


def _size(products: list[tuple[int, int]]) -> int:
    return sum(inputs * outputs for inputs, outputs in products)


def of_ours(model: "Model", router: "Router", vocab_size: int) -> Shape:
    """The shape of a model that is configured and built here."""
    moe_layers = model.num_layers - model.num_dense_layers
    latent = model.latent if model.architecture == "deepseek_v3" else None
    return Shape(
        hidden=model.hidden_size,
        vocab=vocab_size,
        attention_layers=model.num_layers,
        heads=model.num_attention_heads,
        kv_heads=model.kv_heads,
        head_dim=latent.nope_head_dim + latent.rope_head_dim if latent else model.head_dim,
        value_dim=latent.value_head_dim if latent else None,
        query_rank=(latent.query_rank or 0) if latent else 0,
        kv_rank=latent.kv_rank if latent else 0,
        rope_dim=latent.rope_head_dim if latent else 0,
        dense_layers=model.num_dense_layers,
        dense_size=model.dense_width(router),
        moe_layers=moe_layers,
        experts=router.num_experts,
        top_k=router.top_k,
        expert_size=model.expert_size,
        shared_size=router.num_shared_experts * model.expert_size,
    )
