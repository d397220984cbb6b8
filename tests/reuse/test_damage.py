"""Damage between two steps of the code, or on disk between two stages: every kind is refused by name."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from hpc.config import Upcycle
from hpc.errors import ArtifactError, DataError
from hpc.model.routing import PASSPORT
from hpc.reuse.dense import DenseModel
from hpc.reuse.gguf import _compare
from hpc.reuse.shape import sparse_config
from hpc.reuse.upcycle import upcycle, verify
from hpc.shrink.compressed import named_matrices
from hpc.shrink.matrices import Named, check_matrices
from hpc.shrink.proof import KL_LIMIT
from hpc.stages.common import BASE_FILE
from hpc.stages.merge import _check_base, _take_passport
from hpc.stages.reuse import _census, _check_sense

SQUARE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
"""Down projections are square, so that a transposed one has the right shape."""
OBLONG = {**SQUARE, "intermediate_size": 96}
Tensors = dict[str, torch.Tensor]


def dense(folder: Path, shape: dict[str, Any] = SQUARE) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, tie_word_embeddings=True), dtype=torch.float32)
    model.save_pretrained(folder)
    return model


def expert(number: int, matrix: str) -> str:
    return f"model.layers.1.block_sparse_moe.experts.{number}.{matrix}.weight"


def swap_gate_and_up(tensors: Tensors) -> None:
    tensors[expert(3, "w1")], tensors[expert(3, "w3")] = tensors[expert(3, "w3")], tensors[expert(3, "w1")]


def transpose_down(tensors: Tensors) -> None:
    tensors[expert(3, "w2")] = tensors[expert(3, "w2")].t().contiguous()


def leave_at_random(tensors: Tensors) -> None:
    tensors[expert(3, "w1")] = 0.02 * torch.randn_like(tensors[expert(3, "w1")])


def drop(tensors: Tensors) -> None:
    for matrix in ("w1", "w2", "w3"):
        del tensors[expert(3, matrix)]


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "damage", "words"),
    [
        (SQUARE, swap_gate_and_up, r"layers\.1\.mlp\.experts\.w1, expert 3 is not its part of the dense block: 1\.4"),
        (SQUARE, transpose_down, r"layers\.1\.mlp\.experts\.w2, expert 3 is not its part"),
        (OBLONG, transpose_down, r"the experts of model\.layers\.1\.mlp\.experts\.w2 have different shapes"),
        (SQUARE, leave_at_random, r"layers\.1\.mlp\.experts\.w1, expert 3 is not its part"),
        (SQUARE, drop, r"holds 3 of 4 experts"),
    ],
)
def test_an_upcycled_expert_that_is_not_its_part_of_the_dense_block_is_refused(
    noise: float, shape: dict[str, Any], damage: Callable[[Tensors], None], words: str, tmp_path: Path
) -> None:
    dense(tmp_path / "dense", shape)
    (tmp_path / "sparse").mkdir()
    source, wanted = DenseModel(tmp_path / "dense"), Upcycle(num_experts=4, noise=noise)
    upcycle(source, wanted, tmp_path / "sparse", 1)
    assert verify(source, wanted, tmp_path / "sparse") == 2 * 4 * 3
    file = tmp_path / "sparse/model-00002-of-00003.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match=words):
        verify(source, wanted, tmp_path / "sparse")


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_a_quantized_expert_with_another_matrix_is_refused_where_the_divergence_sees_nothing(part: str) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(**SQUARE, num_local_experts=8)
    source, read = (AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval() for _ in range(2))
    read.load_state_dict(source.state_dict())
    with torch.no_grad():
        for parameter in read.parameters():  # what rounding does
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0.0
    assert check_matrices(in_numpy(source), in_numpy(read), 4).worst < 0.15
    with torch.no_grad():
        matrix = getattr(read.model.layers[1].mlp.experts, part)[5]
        matrix.copy_(torch.cat(matrix.chunk(2)[::-1]) if part == "gate_up_proj" else matrix.t().clone())
    p, q = (model(input_ids=torch.arange(128).view(2, 64)).logits.log_softmax(-1) for model in (source, read))
    assert (p.exp() * (p - q)).sum(-1).mean() < KL_LIMIT[4]
    with pytest.raises(ArtifactError, match=rf"another model\.layers\.1\.mlp\.experts\.5\.{part[:4]}"):
        check_matrices(in_numpy(source), in_numpy(read), 4)


def in_numpy(model: Any) -> Iterator[Named]:
    """A model's matrices, an expert's by itself."""
    return ((name, tensor.detach().numpy()) for name, tensor in named_matrices(model))


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm",
}  # fmt: skip


def in_gguf(model: Any) -> Any:
    """A reader of a file that holds the model; rows of queries in another order, as llama.cpp has them."""
    tensors = []
    for name, value in model.named_parameters():
        known = name.replace("model.layers", "blk")
        for theirs, short in GGUF_NAMES.items():
            known = known.replace(theirs, short)
        data = value.detach().clone()
        data = data.flip(0) if ".q_proj" in name else data
        tensors.append(SimpleNamespace(name=known, data=data.numpy(), tensor_type=GGMLQuantizationType.F32))
    return SimpleNamespace(tensors=tensors)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda a: (a["ffn_gate"], a["ffn_up"]), "mlp.gate_proj.weight did not arrive"),
        (lambda a: (a["ffn_down"], a["attn_output"]), "did not arrive"),
    ],
)
def test_a_gguf_tensor_that_arrived_under_another_name_is_refused(damage: Any, words: str, tmp_path: Path) -> None:
    model = dense(tmp_path)
    reader = in_gguf(model)
    _compare(tmp_path, reader, model)
    first, second = damage({tensor.name.split(".")[2]: tensor for tensor in reader.tensors if "blk.1" in tensor.name})
    first.data, second.data = second.data, first.data
    with pytest.raises(ArtifactError, match=words):
        _compare(tmp_path, reader, model)


def test_a_gguf_matrix_that_arrived_transposed_or_not_at_all_is_refused(tmp_path: Path) -> None:
    model = dense(tmp_path)
    reader = in_gguf(model)
    down = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
    reader.tensors.remove(down)
    with pytest.raises(ArtifactError, match=r"holds no model\.layers\.0\.mlp\.down_proj\.weight.*random"):
        _compare(tmp_path, reader, model)
    down.data = down.data.T.copy()
    reader.tensors.append(down)
    with pytest.raises(ArtifactError, match=r"0\.mlp\.down_proj\.weight did not arrive"):
        _compare(tmp_path, reader, model)


def letters(folder: Path, entries: int) -> None:
    """A tokenizer of bytes with some more entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        letter: number for number, letter in enumerate([*alphabet, *(f"<{n}>" for n in range(entries - 256))])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused_with_the_difference(tmp_path: Path) -> None:
    dense(tmp_path)
    letters(tmp_path, 256)
    _census(tmp_path)
    letters(tmp_path, 261)
    with pytest.raises(ArtifactError, match="knows 261 tokens, the model has embeddings for 256, 5 fewer"):
        _census(tmp_path)


def test_a_model_that_predicts_worse_than_a_guess_is_refused(tmp_path: Path) -> None:
    model = dense(tmp_path)
    letters(tmp_path, 256)
    assert _check_sense(tmp_path) == pytest.approx(8.0, abs=0.3)  # bytes at random
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(40)
    model.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="worse than guessing does"):
        _check_sense(tmp_path)


def test_a_layer_that_no_file_holds_is_refused_and_so_is_a_file_cut_short(tmp_path: Path) -> None:
    dense(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ArtifactError, match=r"holds no model\.layers\.2\..*: it would stay random"):
        _census(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors cannot be read .*: fetch it again"):
        _census(tmp_path)


def test_a_sparse_model_is_not_upcycled() -> None:
    with pytest.raises(DataError, match=r"\(mixtral\) is a mixture of experts already"):
        sparse_config(MixtralConfig(**SQUARE, num_local_experts=4).to_dict(), Upcycle(num_experts=4))
    with pytest.raises(DataError, match="granularity = 3 does not divide intermediate_size 64"):
        sparse_config(LlamaConfig(**SQUARE).to_dict(), Upcycle(num_experts=6, granularity=3, top_k=3))


def test_an_adapter_of_other_weights_is_refused_though_the_stage_has_the_same_name(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'lora' does not say what it was trained on"):
        _check_base("lora", tmp_path, "tuned", "a" * 64)  # a folder that peft wrote elsewhere
    (tmp_path / BASE_FILE).write_text(json.dumps({"stage": "tuned", "digest": "a" * 64, "held_out_ids": [[1]]}))
    assert _check_base("lora", tmp_path, "tuned", "a" * 64) == [[1]]
    with pytest.raises(ArtifactError, match=r"trained on other weights of 'tuned' \(digest aaaaaaaaaaaa, now bbbbbb"):
        _check_base("lora", tmp_path, "tuned", "b" * 64)
    with pytest.raises(ArtifactError, match="was trained on 'tuned', not on 'sparse'"):
        _check_base("lora", tmp_path, "sparse", "b" * 64)


def test_a_merged_model_has_the_passport_of_its_base_and_says_so(tmp_path: Path) -> None:
    for name in ("base", "merged"):
        (tmp_path / name).mkdir()
    _take_passport("tuned", tmp_path / "base", tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())
    (tmp_path / "base" / PASSPORT).write_text(json.dumps({"assignments": [[3, 1]]}))
    _take_passport("tuned", tmp_path / "base", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / PASSPORT).read_text()) == {
        "measured_on": "tuned", "assignments": [[3, 1]],
    }  # fmt: skip


def test_an_architecture_that_transformers_does_not_have_is_told_in_one_line(tmp_path: Path) -> None:
    dense(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    with pytest.raises(DataError, match=r"config\.json cannot be used \(.*nonsense"):
        _census(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(DataError, match="brings code of its own"):
        _census(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    with pytest.raises(ArtifactError, match=r"is \(256, 64\), the model wants \(256, 48\)"):
        _census(tmp_path)
