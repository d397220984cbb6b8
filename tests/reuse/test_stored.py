"""Checkpoints read range by range: every element, in every layout, and what is missing is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from hpc.errors import ArtifactError, DataError
from hpc.reuse.stored import StoredModel, logical_parameters
from tests.ranks import on_ranks

SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SHAPE, moe_intermediate_size=24, head_dim=8, num_experts=8,
                                        num_experts_per_tok=2, norm_topk_prob=True),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SHAPE, moe_intermediate_size=24, shared_expert_intermediate_size=40,
                                        num_experts=4, num_experts_per_tok=2, norm_topk_prob=True),
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
}  # fmt: skip


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "60KB") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[kind](), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return logical_parameters({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_of_a_sharded_file_is_read_as_it_was_written(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path, torch.bfloat16)
    stored = StoredModel(tmp_path)
    assert stored.check(shapes_of(model))["elements"] == sum(p.numel() for p in model.parameters())
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):
            for part, wanted in zip(("w1", "w3"), parameter.chunk(2, 1), strict=True):
                whole = name.replace("gate_up_proj", part)
                assert torch.equal(stored.tensor(whole), wanted)
                some = torch.zeros(701)  # from the middle of a row of one expert into the next expert
                stored.fill(whole, 333, some)
                assert torch.equal(some, wanted.reshape(-1)[333 : 333 + 701].float())
        elif name.endswith(".experts.down_proj"):
            assert torch.equal(stored.tensor(name.replace("down_proj", "w2")), parameter)
        else:
            (logical,) = logical_parameters({name: tuple(parameter.shape)})
            assert torch.equal(stored.tensor(logical), parameter)


def test_a_file_with_fused_experts_is_read_too(tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path, shard="1GB")
    fused = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(fused, tmp_path / "model.safetensors")
    stored = StoredModel(tmp_path)
    stored.check(shapes_of(model))
    gate = model.model.layers[1].mlp.experts.gate_up_proj[:, :24]
    assert torch.equal(stored.tensor("model.layers.1.mlp.experts.w1"), gate)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"), "lacks expert 2 of 4"),
        (lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"), "q_proj.weight: it would stay random"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"\(31,\), the model wants \(32,\)"),
        (lambda t: t.update({"model.layers.9.x.weight": torch.ones(3)}), "which the model has no place for"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_first_difference(damage: Any, words: str, tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path, shard="1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=words):
        StoredModel(tmp_path).check(shapes_of(model))


def test_code_and_pickles_are_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path, shard="1GB")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="only pickle files"):
        StoredModel(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(DataError, match="brings code of its own"):
        StoredModel(tmp_path)


def filled(kind: str, folder: Path, cases: list[str]) -> dict[str, Any]:
    """tests.reuse.filling on two ranks."""
    return on_ranks(2, "tests.reuse.filling", folder.parent / f"{kind}.json", folder, *cases)


@pytest.mark.parametrize(
    ("kind", "cases"),
    [("mixtral", ["2/1", "2/3", "1/2", "1/1/lora", "1/3/lora"]), ("qwen2_moe", ["2/2", "2/3"]), ("llama", ["1/3"])],
)
def test_every_layout_starts_from_the_same_model(kind: str, cases: list[str], tmp_path: Path) -> None:
    model = saved(kind, tmp_path / kind)
    with torch.no_grad():
        wanted = model(input_ids=torch.arange(16).view(1, 16)).logits.flatten()
    found = filled(kind, tmp_path / kind, cases)
    after = {case.endswith("lora"): told["after"] for case, told in found.items()}
    for case, told in found.items():
        assert float((torch.tensor(told["logits"]) - wanted).abs().max()) < 1e-5
        assert told["after"] == pytest.approx(after[case.endswith("lora")], abs=1e-5)
