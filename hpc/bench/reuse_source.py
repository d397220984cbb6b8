"""A checkpoint of any size without a model in memory: random bf16 weights under Mixtral's names, layer by layer."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Widths and counts of a mixture of experts."""

    hidden: int
    expert: int
    layers: int
    experts: int
    vocabulary: int


def write(folder: Path, shape: Shape, seed: int = 0) -> None:
    """config.json and one safetensors file per layer, and one for embedding, head and last norm."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden, "intermediate_size": shape.expert, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 64, "num_key_value_heads": shape.hidden // 64,
        "num_local_experts": shape.experts, "num_experts_per_tok": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "sliding_window": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    random = torch.Generator().manual_seed(seed)

    weight_map: dict[str, str] = {}

    def save(number: int, tensors: dict[str, Tensor]) -> None:
        name = f"model-{number + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    def matrix(rows: int, columns: int) -> Tensor:
        return (0.02 * torch.randn(rows, columns, generator=random)).bfloat16()

    for layer in range(shape.layers):
        save(layer, dict(_layer(layer, shape, matrix)))
    ends = {
        "model.embed_tokens.weight": matrix(shape.vocabulary, shape.hidden),
        "lm_head.weight": matrix(shape.vocabulary, shape.hidden),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
    }
    save(shape.layers, ends)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _layer(layer: int, shape: Shape, matrix: Callable[[int, int], Tensor]) -> Iterator[tuple[str, Tensor]]:
    at = f"model.layers.{layer}"
    for part in "qkvo":
        yield f"{at}.self_attn.{part}_proj.weight", matrix(shape.hidden, shape.hidden)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{norm}.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)
    yield f"{at}.block_sparse_moe.gate.weight", matrix(shape.experts, shape.hidden)
    for expert in range(shape.experts):
        for name in ("w1", "w3"):
            yield f"{at}.block_sparse_moe.experts.{expert}.{name}.weight", matrix(shape.expert, shape.hidden)
        yield f"{at}.block_sparse_moe.experts.{expert}.w2.weight", matrix(shape.hidden, shape.expert)
