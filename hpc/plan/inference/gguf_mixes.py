"""Which type llama.cpp gives each tensor in its mixes (Q4_K_M, Q2_K, ...), and the bits of each type.

After llama_tensor_get_type_impl and tensor_type_fallback of ggml-org/llama.cpp src/llama-quant.cpp @ 007dbbf, without
an importance matrix. Left out: the exceptions for Falcon, for GLM and for Llama-70B's values (0.1 % of its size).
tests/plan/test_inference.py holds the sizes against those of published files.
"""

from hpc.plan.inference.tensors import Tensor
from hpc.plan.shapes import Shape

BITS = {
    "F32": 32.0, "F16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q5_0": 5.5, "Q5_1": 6.0, "Q4_K": 4.5,
    "Q4_0": 4.5, "IQ4_NL": 4.5, "IQ4_XS": 4.25, "Q3_K": 3.4375, "Q2_K": 2.625,
}  # fmt: skip
"""Bits per weight with scales and minima (ggml-common.h)."""
FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0", "IQ4_XS": "IQ4_NL"}
"""What a type with blocks of 256 becomes where rows do not divide by that: its neighbour with blocks of 32."""
MIXES = {
    "bf16": "F16", "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k_m": "Q5_K", "q4_k_m": "Q4_K", "iq4_xs": "IQ4_XS",
    "q4_0": "Q4_0", "q3_k_m": "Q3_K", "q2_k": "Q2_K",
}  # fmt: skip
"""Mix -> the type of what has no rule of its own; bf16 has the bits of F16."""


def bits(mix: str, tensor: Tensor, shape: Shape) -> float:
    """Bits per weight of a tensor in a mix."""
    return BITS[tensor_type(mix, tensor, shape)]


def tensor_type(mix: str, tensor: Tensor, shape: Shape) -> str:
    """ggml's type of a tensor in a mix."""
    if tensor.role in ("norm", "router"):
        return "F32"
    base = MIXES[mix]
    if base in ("F16", "Q8_0"):
        found = base
    elif tensor.role == "head":
        found = "Q6_K"
    else:
        found = _by_role(mix, base, tensor, shape)
    if tensor.inputs % 256 and found in FALLBACK:
        found = FALLBACK[found]
    return "F16" if tensor.inputs % 32 else found


def _by_role(mix: str, base: str, tensor: Tensor, shape: Shape) -> str:
    eight, layer, layers = shape.moe_layers > 0 and shape.experts == 8, tensor.layer, tensor.layers
    if tensor.role in ("k", "v") and eight:
        return "Q8_0"
    if tensor.role == "v":
        few = shape.heads // shape.kv_heads >= 4
        rules = {
            "q2_k": "Q4_K" if few else "Q3_K", "q3_k_m": "Q5_K" if layer < 2 else "Q4_K",
            "iq4_xs": "Q5_K" if few else base,
        }  # fmt: skip
        return rules.get(mix, _more(mix, base, layer, layers))
    if tensor.role == "output" and eight:
        return "Q5_K" if mix in ("q2_k", "q3_k_m", "q4_k_m", "iq4_xs") else base
    if tensor.role == "output":
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K"}.get(mix, base)
    if tensor.role == "down":
        early = {
            "q3_k_m": "Q5_K" if layer < layers // 16 else "Q4_K",
            "iq4_xs": "Q5_K" if layer < layers // 8 else base,
        }
        return {"q2_k": "Q3_K", **early}.get(mix, _more(mix, base, layer, layers))
    return base


def _more(mix: str, base: str, layer: int, layers: int) -> str:
    """Six bits in the first and last eighth and in each third layer between."""
    return "Q6_K" if mix in ("q4_k_m", "q5_k_m") and more_bits(layer, layers) else base


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits, which mlx-lm's mixed recipes have too."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
