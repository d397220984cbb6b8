"""The bits that llama.cpp's mixes (Q4_K_M, Q2_K, ...) give each matrix of a model that is known by its shape alone.

The mixes themselves are in hpc/shrink/gguf_mix.py, where files are made by them. tests/plan/test_inference.py holds the
sizes against those of published files.
"""

from hpc.plan.inference.tensors import Tensor
from hpc.plan.shapes import Shape
from hpc.shrink.gguf_mix import FILE_TYPES, Facts, type_of

BITS = {
    "F32": 32.0, "F16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q5_0": 5.5, "Q5_1": 6.0, "Q4_K": 4.5,
    "Q4_0": 4.5, "Q4_1": 5.0, "IQ4_NL": 4.5, "IQ4_XS": 4.25, "Q3_K": 3.4375, "Q2_K": 2.625,
}  # fmt: skip
"""Bits per weight with scales and minima (ggml-common.h)."""
MIXES = tuple(mix for mix in FILE_TYPES if mix != "f16")
NAMES = {
    "head": "output", "embedding": "token_embd", "q": "blk.{}.attn_q", "k": "blk.{}.attn_k", "v": "blk.{}.attn_v",
    "output": "blk.{}.attn_output", "gate": "blk.{}.ffn_gate", "up": "blk.{}.ffn_up", "down": "blk.{}.ffn_down",
    "latent": "blk.{}.attn_latent", "state": "blk.{}.ssm",
}  # fmt: skip
"""Role -> llama.cpp's name; those of latent attention and state-space layers have no rule of their own."""


def bits(mix: str, tensor: Tensor, shape: Shape) -> float:
    """Bits per weight of a tensor in a mix."""
    return BITS[tensor_type(mix, tensor, shape)]


def tensor_type(mix: str, tensor: Tensor, shape: Shape) -> str:
    """ggml's type of a tensor in a mix."""
    if tensor.role in ("norm", "router"):
        return "F32"
    name = NAMES[tensor.role].format(tensor.layer) + ".weight"
    experts = shape.experts if shape.moe_layers else 0
    facts = Facts(tensor.layers, experts, shape.heads // shape.kv_heads)
    return type_of(mix, name, tensor.inputs, facts, tensor.layer, tensor.layers)
