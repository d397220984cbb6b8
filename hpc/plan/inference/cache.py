"""Memory beside the weights: keys and values of the context in fp16, and what a runtime needs for itself."""

from hpc.plan.shapes import Shape

BYTES = 2
"""Of a cached number: fp16, the default of llama.cpp and MLX."""
MICRO_BATCH = 512
"""Tokens of a prompt that llama.cpp computes at once (n_ubatch)."""
BASE = 256 * 2**20
"""Assumed: program, tokenizer, command buffers."""
WIDTHS = 16
"""Assumed: rows of width H in fp32 that are held at once for each token of the micro-batch."""


def cache_bytes(shape: Shape, context: int) -> float:
    """Bytes of the cache after `context` tokens.

    Grouped queries: keys and values of the kv heads. Latent attention: one latent vector and the rotary part (as
    llama.cpp and vLLM keep it). A windowed layer holds its window. State-space layers hold a state of fixed size.
    """
    width = shape.kv_rank + shape.rope_dim if shape.kv_rank else shape.kv_heads * (shape.head_dim + shape.values)
    full = (shape.attention_layers - shape.windowed_layers) * context
    windowed = shape.windowed_layers * min(shape.window, context)
    state = 4.0 * shape.mamba_layers * shape.mamba_inner * shape.mamba_state
    return BYTES * width * (full + windowed) + state


def overhead_bytes(shape: Shape) -> float:
    """Buffers of a runtime, estimated: activations of a micro-batch in fp32, logits of one, and the program."""
    return BASE + 4.0 * (MICRO_BATCH * WIDTHS * shape.hidden + shape.vocab)


def longest_context(shape: Shape, left: float, limit: int | None) -> int:
    """The most tokens whose cache fits `left` bytes, at most the model's own `limit`; 0 when none does."""
    low, high = 0, limit or 2**24
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cache_bytes(shape, middle) <= left else (low, middle - 1)
    return low
