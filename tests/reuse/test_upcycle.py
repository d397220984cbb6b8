"""Dense models made sparse: the same logits at step 0, whatever the router says, and a clear no where it cannot be."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from hpc.config import Model, Router, Upcycle
from hpc.errors import DataError
from hpc.model.build import build_model, load_model, model_config, save_model
from hpc.model.exactness import difference, exact_logits
from hpc.reuse.dense import DenseModel
from hpc.reuse.upcycle import upcycle, verify

SHAPE: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
DENSE = {
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_theta=12345.0),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
}
WAYS = {
    "copies": {"num_experts": 4},
    "fine-grained": {"num_experts": 8, "granularity": 4, "top_k": 4},
    "two groups a token": {"num_experts": 12, "granularity": 2, "top_k": 4},
    "shared": {"num_experts": 12, "granularity": 4, "shared": 1, "top_k": 3},
    "two shared, two groups": {"num_experts": 8, "granularity": 4, "shared": 2, "top_k": 4},
}
IDS = torch.arange(48).view(1, 48) * 7 % 100


def dense_model(kind: str, folder: Path) -> Any:
    """A dense model on disk, with norms and biases that are not at their initial ones and zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DENSE[kind](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", DENSE)
def test_the_sparse_model_computes_what_the_dense_one_does(kind: str, way: str, tmp_path: Path) -> None:
    dense, wanted = dense_model(kind, tmp_path / "dense"), Upcycle.model_validate(WAYS[way])
    out = tmp_path / "sparse"
    out.mkdir()
    if kind == "qwen3" and wanted.shared:
        with pytest.raises(DataError, match="no sparse counterpart"):
            upcycle(DenseModel(tmp_path / "dense"), wanted, out, seed=1)
        return
    upcycle(DenseModel(tmp_path / "dense"), wanted, out, seed=1)
    sparse = load_model(out).eval()
    with torch.no_grad():
        difference = (sparse(input_ids=IDS).logits - dense(input_ids=IDS).logits).abs().max()
    assert float(difference) < 1e-5
    assert sparse.config.num_experts_per_tok == wanted.top_k


def test_noise_makes_copies_different_and_the_model_another_one(tmp_path: Path) -> None:
    dense = dense_model("llama", tmp_path / "dense")
    out = tmp_path / "sparse"
    out.mkdir()
    upcycle(DenseModel(tmp_path / "dense"), Upcycle(num_experts=4, noise=0.1), out, seed=1)
    layer = load_file(out / "model-00001-of-00003.safetensors")
    first, second = (layer[f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight"] for n in (0, 1))
    source = dense.model.layers[0].mlp.gate_proj.weight.detach()
    assert float((first - source).std() / source.std()) == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(first, second)


def test_copies_of_one_group_share_a_row_of_the_router(tmp_path: Path) -> None:
    dense_model("llama", tmp_path / "dense")
    out = tmp_path / "sparse"
    out.mkdir()
    upcycle(DenseModel(tmp_path / "dense"), Upcycle(num_experts=8, granularity=4, top_k=4), out, seed=1)
    rows = load_file(out / "model-00002-of-00003.safetensors")["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.equal(rows[:4], rows[:1].expand(4, -1))
    assert not torch.equal(rows[0], rows[4])


@pytest.mark.parametrize(
    ("change", "words"),
    [({"intermediate_size": 90}, "does not divide"), ({"mlp_bias": True}, "biases"),
     ({"model_type": "gpt2"}, "gpt2 has no sparse counterpart")],
)  # fmt: skip
def test_what_cannot_be_made_sparse_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    dense_model("llama", tmp_path / "dense")
    source = DenseModel(tmp_path / "dense")
    source.config |= change
    with pytest.raises(DataError, match=words):
        upcycle(source, Upcycle(num_experts=8, granularity=4, top_k=4), tmp_path, seed=1)


@pytest.mark.parametrize(
    ("asked", "way_out"),
    [({"num_experts": 9, "granularity": 4, "top_k": 4}, "try 12"), ({"num_experts": 8, "granularity": 4}, "try 4"),
     ({"num_experts": 8, "granularity": 2, "shared": 2}, "try 1"), ({"num_experts": 2, "top_k": 3}, "at most 2")],
)  # fmt: skip
def test_a_shape_that_does_not_work_out_names_one_that_does(asked: dict[str, Any], way_out: str) -> None:
    with pytest.raises(ValueError, match=way_out):
        Upcycle.model_validate(asked)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_one_expert_that_was_pretrained_here_is_a_dense_model(
    architecture: Literal["mixtral", "qwen3_moe"], tmp_path: Path
) -> None:
    shape = Model(architecture=architecture, hidden_size=64, num_layers=2, num_attention_heads=4, expert_size=96)
    config = model_config(shape, Router(num_experts=1, top_k=1), 100, 64, 0)
    dense = build_model(config, seed=3).eval()
    save_model(config, dict(dense.state_dict()), tmp_path / "dense")
    wanted, out = Upcycle(num_experts=8, granularity=2), tmp_path / "sparse"
    out.mkdir()
    source = DenseModel(tmp_path / "dense")
    upcycle(source, wanted, out, seed=1)
    assert verify(source, wanted, out) == 2 * 3 * 8
    sparse = load_model(out).eval()
    found = difference(exact_logits(dense, IDS), exact_logits(sparse, IDS))
    assert found.accepted
    assert (sparse.config.num_local_experts, sparse.config.num_experts_per_tok) == (8, 2)


def test_a_mixture_of_more_experts_is_not_dense(tmp_path: Path) -> None:
    shape = Model(architecture="mixtral", hidden_size=64, num_layers=1, num_attention_heads=4, expert_size=96)
    config = model_config(shape, Router(num_experts=2, top_k=1), 100, 64, 0)
    save_model(config, dict(build_model(config, seed=3).state_dict()), tmp_path / "sparse")
    with pytest.raises(DataError, match="mixture of experts already"):
        upcycle(DenseModel(tmp_path / "sparse"), Upcycle(num_experts=4), tmp_path, seed=1)
