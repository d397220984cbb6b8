"""Which type each tensor of a .gguf file gets: llama.cpp's mixes, as its quantize tool chooses them.

Written after llama-quant.cpp of build 11549 (`llama_tensor_get_type_impl`, `tensor_type_fallback`,
`tensor_allows_quantization`), for the file types offered here and the architectures that are exported. There it is
inside a C++ function that the wheel of llama.cpp does not have. Names of types are ggml's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

FILE_TYPES = {
    "f16": ("F16", 1), "q8_0": ("Q8_0", 7), "q6_k": ("Q6_K", 18), "q5_k_m": ("Q5_K", 17), "q4_k_m": ("Q4_K", 15),
    "iq4_xs": ("IQ4_XS", 30), "q4_0": ("Q4_0", 2), "q3_k_m": ("Q3_K", 12), "q2_k": ("Q2_K", 10),
}  # fmt: skip
"""What a file may be quantized to -> the type of most of its matrices, and llama.cpp's number of the mix."""
BLOCKS = {
    "Q2_K": 256, "Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256, "IQ4_XS": 256, "IQ4_NL": 32, "Q4_0": 32,
    "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, "F16": 1, "BF16": 1, "F32": 1,
}  # fmt: skip
"""Type -> how many weights of a row share a scale: a row has to be a multiple of it."""
SMALLER_BLOCKS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL",
}  # fmt: skip
"""What rows that are no multiple of 256 get instead."""


@dataclass(frozen=True)
class Facts:
    """What the mixes depend on besides names and shapes."""

    num_layers: int
    num_experts: int
    """0 for a dense model."""
    heads_per_kv: int
    """Attention heads that share one key and value head."""
    has_importance: bool = False
    """Whether an importance matrix guides the rounding."""


def choose_types(
    quantization: str, shapes: Mapping[str, tuple[int, ...]], facts: Facts, overrides: Mapping[str, str]
) -> dict[str, str]:
    """Tensor -> type, for every tensor that is quantized; the others keep theirs.

    shapes: numpy's order, rows last. overrides: regular expression -> type, searched for in names; the first that is
    found decides instead of the mix.
    """
    values = sorted((name for name in shapes if _is_value(name)), key=_layer)
    tied = "output.weight" not in shapes
    chosen = {}
    for name, shape in shapes.items():
        if not is_quantizable(name, shape):
            continue
        asked = next((kind for pattern, kind in overrides.items() if re.search(pattern, name)), None)
        if asked is None:
            head = "output.weight" if tied and name == "token_embd.weight" else name
            chosen[name] = type_of(
                quantization, head, shape[-1], facts, values.index(name) if _is_value(name) else 0, len(values)
            )
        else:
            chosen[name] = fitting(asked, shape[-1])
    return chosen


def type_of(quantization: str, name: str, row: int, facts: Facts, order: int, num_values: int) -> str:
    """The type of a matrix that is quantized. row: its columns; order: which of all matrices of values it is, of
    num_values. A tied embedding is asked for as `output.weight`."""
    if name == "output.weight":
        return fitting(_head(FILE_TYPES[quantization][0], row), row)
    return fitting(_mixed(quantization, name, facts, order, num_values), row)


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Matrices are, except a router's and norms."""
    dimensions = len([size for size in shape if size > 1])
    return dimensions >= 2 and name.endswith("weight") and not name.endswith(("_norm.weight", "ffn_gate_inp.weight"))


def fitting(kind: str, row: int) -> str:
    """The type itself, or what llama.cpp takes where rows of this length do not divide into its blocks."""
    if row % BLOCKS[kind]:
        kind = SMALLER_BLOCKS.get(kind, kind)
    return "F16" if row % BLOCKS[kind] else kind


def _is_value(name: str) -> bool:
    return name.endswith(("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _head(base: str, row: int) -> str:
    """Of the matrix that makes logits."""
    return "Q8_0" if base == "Q8_0" or row % BLOCKS[base] else "Q6_K"


def more_bits(position: int, count: int) -> bool:
    """The first and last eighth of the layers, and every third between; mlx-lm's mixed recipes have it too."""
    return position < count // 8 or position >= 7 * count // 8 or (position - count // 8) % 3 == 2


def _mixed(quantization: str, name: str, facts: Facts, order: int, num_values: int) -> str:
    """The mix's type. order: which of all matrices of values this is, of num_values."""
    base = FILE_TYPES[quantization][0]
    few_experts = facts.num_experts == 8
    if _is_value(name):
        return "Q8_0" if few_experts else _of_values(quantization, base, facts, order, num_values)
    if name.endswith("attn_k.weight"):
        return "Q8_0" if few_experts else base
    if "ffn_down" in name:
        return _of_down(quantization, base, facts, _layer(name))
    if name.endswith("attn_output.weight"):
        if few_experts:
            return "Q5_K" if quantization in ("q2_k", "q3_k_m", "q4_k_m", "iq4_xs") else base
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K"}.get(quantization, base)
    return base


def _of_values(quantization: str, base: str, facts: Facts, order: int, count: int) -> str:
    shared = facts.heads_per_kv >= 4
    kind = base
    if quantization == "q2_k":
        kind = "Q4_K" if shared else "Q3_K"
    elif quantization == "q3_k_m":
        kind = "Q5_K" if order < 2 else "Q4_K"
    elif quantization == "iq4_xs" and shared:
        kind = "Q5_K"
    elif quantization in ("q4_k_m", "q5_k_m") and more_bits(order, count):
        kind = "Q6_K"
    is_llama_70b = facts.num_layers == 80 and not facts.num_experts and facts.heads_per_kv > 1
    return "Q5_K" if is_llama_70b and kind in ("Q3_K", "Q4_K") else kind


def _of_down(quantization: str, base: str, facts: Facts, layer: int) -> str:
    first = layer < facts.num_layers // 8
    if quantization == "q2_k":
        return "Q3_K"
    if quantization == "q3_k_m":
        return "Q5_K" if layer < facts.num_layers // 16 else "Q4_K"
    if quantization in ("q4_k_m", "q5_k_m") and more_bits(layer, facts.num_layers):
        return "Q6_K"
    if quantization == "iq4_xs" and first and not facts.has_importance:
        return "Q5_K"
    return "Q4_1" if quantization == "q4_0" and first and facts.has_importance else base
