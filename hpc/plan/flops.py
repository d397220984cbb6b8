"""Floating-point operations per token. A multiply and an add count as two.

Source: PaLM (arXiv:2204.02311, appendix B): 6N + 12 L H Q T per token for forward and backward, with N the parameters
of matrix products and T the sequence length; attention is counted as if it were not causal, as is usual for MFU.
"""

from hpc.config import AdapterTraining, Model, Router
from hpc.plan.params import attention_parameters, count, count_adapter

BACKWARD_PER_FORWARD = 2
"""The backward pass does twice the work of the forward pass: gradients of activations, and of weights."""


def attention_flops_per_token(model: Model, seq_len: int) -> float:
    """One token through the attention blocks: their matrices, and 2 L heads (query + value) T."""
    widths = 2 * model.head_dim
    if model.architecture == "deepseek_v3":
        widths = model.latent.nope_head_dim + model.latent.rope_head_dim + model.latent.value_head_dim
    scores = 2.0 * model.num_layers * model.num_attention_heads * widths * seq_len
    return 2.0 * model.num_layers * attention_parameters(model) + scores


def forward_flops_per_token(model: Model, router: Router, vocab_size: int, seq_len: int) -> float:
    """One token through the model: 2 x active matrix parameters, and 2 L heads (query + value) T for attention."""
    parameters = count(model, router, vocab_size)
    outside = parameters.active_matrices - parameters.attention
    return 2.0 * outside + attention_flops_per_token(model, seq_len)


def training_flops_per_token(model: Model, router: Router, vocab_size: int, seq_len: int) -> float:
    """Forward and backward of one token when all weights are trained."""
    return (1 + BACKWARD_PER_FORWARD) * forward_flops_per_token(model, router, vocab_size, seq_len)


def model_flops_utilization(
    tokens_per_s: float, flops_per_token: float, ranks: int, peak_flops_per_rank: float
) -> float:
    """MFU (arXiv:2204.02311, appendix B): model FLOP/s of all ranks over their peak at the training precision.

    Model FLOPs are those of the formula above: recomputed activations and the optimizer do not count.
    """
    return tokens_per_s * flops_per_token / (ranks * peak_flops_per_rank)


def adapter_flops_per_token(
    model: Model, router: Router, vocab_size: int, seq_len: int, settings: AdapterTraining
) -> float:
    """Forward and backward of one token when only adapters are trained.

    Frozen weights need no gradient of their own (2 of 3 parts); adapters on K of E experts are counted in full.
    """
    frozen = 2 * forward_flops_per_token(model, router, vocab_size, seq_len)
    shared = count_adapter(model, router, settings.model_copy(update={"experts": False})) if settings.attention else 0
    on_experts = count_adapter(model, router, settings) - shared
    return frozen + 6.0 * (shared + on_experts * router.top_k / router.num_experts)
