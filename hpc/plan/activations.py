"""Tensors that a micro-batch leaves in memory for its backward pass, counted one by one.

Source: the forward passes of transformers' blocks and of hpc/model (experts, loss); what autograd keeps of each
operation. The method is that of Korthikanti et al. (arXiv:2205.05198, section 4.1); the counts differ with the kernels.

Shape letters: T tokens of the micro-batch, H hidden, Q and KV widths of all query and key/value heads, N query heads, K
experts per token, I expert width, E experts, V vocabulary, S sequence length. Bytes of an item: 2 or 4.
"""

from dataclasses import dataclass

from hpc.config import Model, Router, TrainingBase

FP32 = 4
LOSS_ROWS = 512
"""Rows of logits that exist at a time (hpc/model/loss.py, ROWS)."""
LOGIT_COPIES = 3
"""Of these rows in fp32: logits, their log-softmax, and a copy in another order for the weights' gradient."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank and one micro-batch."""

    attention: float
    """Kept by all attention blocks and their norms."""
    experts: float
    """Kept by all MoE layers for the tokens of this rank: routed and shared experts, dense layers, routers."""
    exchange: float
    """Kept because tokens travel: copies of rows that were sent and that came back. 0 without expert parallelism."""
    head: float
    """Gradients of the hidden states and of the head's weight, which the loss takes at once."""
    rows: float
    """Logits of the rows that the loss is visiting."""
    again: float
    """What the backward pass computes again at a time: of one block, or of one attention block."""
    logits: float
    """Of all tokens of a micro-batch, and their log-softmax: an evaluation has no chunked loss."""

    @property
    def kept(self) -> float:
        """At the end of the forward pass."""
        return self.attention + self.experts + self.exchange + self.head


def activations(
    model: Model, router: Router, settings: TrainingBase, vocab_size: int, item: int, load: float, *, in_cache: bool
) -> Activations:
    """load: tokens that reach this rank's experts over an even share. in_cache: experts compute one after the other as
    hpc/model/experts_cpu.py does, and keep only the products before the gate and the outputs."""
    batches, h = settings.batches, model.hidden_size
    tokens = batches.micro_batch_size * batches.seq_len
    before, attention = _attention(model, settings, item)
    routed, exchange, always = _experts(model, router, settings, item, load, in_cache=in_cache)
    dense = _swiglu(model.dense_width(router), item) if model.num_dense_layers else 0
    moe_layers = model.num_layers - model.num_dense_layers
    of_experts = moe_layers * (routed + always) + model.num_dense_layers * dense
    kept_attention = model.num_layers * (before * 2 + attention)  # a norm before attention, one before the experts
    one_block = before * 2 + attention + routed + exchange + always
    exchanged, again = moe_layers * exchange, 0.0
    if settings.recompute == "attention":
        kept_attention, again = model.num_layers * before * 2, attention
    elif settings.recompute == "full":
        kept_attention, again = model.num_layers * item * h, one_block
        of_experts = exchanged = 0.0
    head = tokens * (item * h + _norm(h, item)) + vocab_size * h * (FP32 + (item if item < FP32 else 0))
    rows = min(tokens, LOSS_ROWS) * vocab_size * (LOGIT_COPIES * FP32 + (item if item < FP32 else 0))
    return Activations(
        attention=float(tokens * kept_attention),
        experts=float(tokens * of_experts),
        exchange=float(tokens * exchanged),
        head=float(head),
        rows=float(rows),
        again=float(tokens * again),
        logits=float(tokens * vocab_size * (2 * FP32 + (item if item < FP32 else 0))),
    )


def _norm(width: int, item: int) -> int:
    """RMS norm: its input in fp32, the normalised input, and the result that the next product keeps."""
    return width * (FP32 + 2 * item)


def _attention(model: Model, settings: TrainingBase, item: int) -> tuple[int, int]:
    """Bytes per token and layer: of the norm before the block, and of the block."""
    h, heads = model.hidden_size, model.num_attention_heads
    before = _norm(h, item)
    if model.architecture == "deepseek_v3":
        latent = model.latent
        query, value = heads * (latent.nope_head_dim + latent.rope_head_dim), heads * latent.value_head_dim
        ranks = latent.kv_rank + (latent.query_rank or 0)
        block = _norm(ranks, item) + item * (2 * query + 3 * value)  # queries, keys; values, outputs, outputs in rows
    else:
        q, kv = heads * model.head_dim, model.kv_heads * model.head_dim
        repeated = q if settings.batches.document_masking else kv  # with a mask, heads are repeated for the kernel
        has_norms = model.architecture in ("qwen3_moe", "olmoe")
        norms = (q + kv) * (FP32 + item) if has_norms else 0
        block = norms + item * (q + 2 * repeated + 2 * q)
    block += FP32 * heads  # log-sums of the softmax
    if settings.attention_kernel == "eager":
        block += heads * settings.batches.seq_len * (FP32 + item)  # probabilities, before and after the cast
    return before, block


def _experts(
    model: Model, router: Router, settings: TrainingBase, item: int, load: float, *, in_cache: bool
) -> tuple[float, float, float]:
    """Bytes per token and layer: of routed experts, of the exchange between ranks, of router and shared experts."""
    h, i, k = model.hidden_size, model.expert_size, router.top_k
    row = item * (2 * i + h) if in_cache else item * (4 * i + 2 * h)
    routed = load * k * row
    exchange = 0.0
    if settings.parallel.expert_parallel_size > 1:  # rows as they came, unevenly, and outputs as they came back
        exchange = item * k * h * (1 + load) if in_cache else item * k * h
    logits = FP32 * router.num_experts * 3
    shared = _swiglu(router.num_shared_experts * i, item) if router.num_shared_experts else 0
    return routed, exchange, float(logits + shared)


def _swiglu(width: int, item: int) -> int:
    """gate, up, silu(gate) and their product."""
    return 4 * item * width
