"""Our models as .gguf files: the same logits in llama.cpp, every expert there, and what cannot be is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc.errors import ArtifactError, ConfigError
from hpc.runtimes.llama_cpp import LlamaCpp
from hpc.runtimes.tokens import check_tokens
from hpc.shrink import gguf as door
from hpc.shrink.gguf_mix import Facts, choose_types
from hpc.shrink.gguf_quantize import quantize
from tests.shrink import wide
from tests.shrink.conftest import Converted

GOLDEN = Path(__file__).with_name("llama_cpp_types.json")
KL = {"q8_0": 0.02, "q4_k_m": 0.15}
"""Of random models, whose routers are all but undecided; see the README for trained ones."""


@pytest.mark.parametrize("kind", wide.CONFIGS)
def test_llama_cpp_gives_the_logits_of_transformers(kind: str, converted: Converted) -> None:
    model, folder, file = converted(kind)
    assert door.refusal(model.config.to_dict()) is None
    runner = LlamaCpp(file, context_length=160, threads=1)
    assert wide.kl(wide.logits_of(model, wide.some_ids()), runner.logits(wide.some_ids())) < 1e-6
    check_tokens(runner, folder, ["x = {1: 'é'}  # isn't\n\n\t你好 🚀 12345"])


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("quantization", ["q8_0", "q4_k_m"])
def test_every_expert_is_quantized_and_near_its_source(
    kind: str, quantization: str, converted: Converted, tmp_path: Path
) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    model, _, file = converted(kind)
    quantize(file, tmp_path / "q.gguf", quantization, 2, {}, {})
    found = LlamaCpp(tmp_path / "q.gguf", 160, 1).logits(wide.some_ids())
    assert wide.kl(wide.logits_of(model, wide.some_ids()), found) < KL[quantization]
    before = {tensor.name: tensor for tensor in GGUFReader(str(file)).tensors}
    for tensor in GGUFReader(str(tmp_path / "q.gguf")).tensors:
        source = before[tensor.name].data.astype(np.float32)
        error = dequantize(tensor.data, tensor.tensor_type) - source
        per_matrix = np.sqrt((error**2).mean((-2, -1)) / (source**2).mean((-2, -1))) if source.ndim > 1 else error
        assert float(np.abs(per_matrix).max()) < {"q8_0": 0.01, "q4_k_m": 0.11}[quantization], tensor.name
    groups = door.census(tmp_path / "q.gguf")
    assert groups["experts"]["parameters"] == sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name
    )
    assert set(groups["experts"]["types"]) <= {"Q8_0"} if quantization == "q8_0" else {"Q4_K", "Q6_K"}
    more = {"qwen3_moe": 5, "deepseek_v3": 2}[kind]  # matrices in Q4_K beside the one that the mix gives Q6_K
    bits = 8.5 if quantization == "q8_0" else (4.5 * more + 6.5625) / (more + 1)
    assert groups["experts"]["bits_per_weight"] == pytest.approx(bits)
    assert groups["router"]["types"].keys() == groups["norms"]["types"].keys() == {"F32"}


def test_types_are_those_that_llama_cpp_chooses() -> None:
    """Written down after llama_model_quantize of node-llama-cpp 3.22.1 had made the same of models of these shapes."""
    for case in json.loads(GOLDEN.read_text()).values():
        layers = {name: range(*one["layers"]) if one["layers"] else [0] for name, one in case["shapes"].items()}
        shapes = {
            name.replace("*", str(layer)): tuple(case["shapes"][name]["shape"])
            for name, numbers in layers.items()
            for layer in numbers
        }
        for quantization, wanted in case["types"].items():
            found = choose_types(quantization, shapes, Facts(**case["facts"]), {})
            for name, runs in wanted.items():
                types = [kind for run in runs.split() for kind in [run.split("*")[0]] * int(run.split("*")[1])]
                assert [found[name.replace("*", str(layer))] for layer in layers[name]] == types, (quantization, name)


def test_a_tensor_can_be_given_its_own_type(converted: Converted, tmp_path: Path) -> None:
    _, _, file = converted("mixtral")
    quantize(file, tmp_path / "q.gguf", "q4_k_m", 1, {r"blk\.1\..*_exps": "Q8_0"}, {})
    types = door.census(tmp_path / "q.gguf")["experts"]["tensor_types"]
    assert {types[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {"Q8_0"}
    assert types["blk.0.ffn_up_exps.weight"] == "Q4_K"


def test_importance_moves_the_error_to_columns_that_do_not_count(converted: Converted, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    _, _, file = converted("mixtral")
    name = "blk.0.ffn_up_exps.weight"
    weights = np.ones((4, 256), np.float32)
    weights[0, :128], weights[1] = 100, 0  # expert 1 saw no token
    errors = []
    for number, importance in enumerate(({}, {name: weights})):
        quantize(file, tmp_path / f"{number}.gguf", "q4_0", 1, {}, importance)
        made, source = (
            next(dequantize(t.data, t.tensor_type) for t in GGUFReader(str(path)).tensors if t.name == name)
            for path in (tmp_path / f"{number}.gguf", file)
        )
        errors.append(((made - source) ** 2).mean(1))
    plain, guided = errors
    assert guided[0, :128].mean() < 0.98 * plain[0, :128].mean()
    assert np.array_equal(guided[1], plain[1])
    with pytest.raises(ArtifactError, match=r"^importance of blk\.0.* has the shape \(4, 255\), the tensor \(4, 256"):
        quantize(file, tmp_path / "x.gguf", "q4_0", 1, {}, {name: weights[:, :255]})


def test_values_that_are_no_numbers_are_refused(converted: Converted, tmp_path: Path) -> None:
    from gguf import GGUFReader

    (tmp_path / "nan.gguf").write_bytes(converted("llama")[2].read_bytes())
    tensor = next(t for t in GGUFReader(str(tmp_path / "nan.gguf"), "r+").tensors if t.name == "blk.1.ffn_up.weight")
    tensor.data[7, 9] = np.nan
    with pytest.raises(ArtifactError, match=r"^blk\.1\.ffn_up\.weight holds values that Q4_K cannot"):
        quantize(tmp_path / "nan.gguf", tmp_path / "out.gguf", "q4_k_m", 1, {}, {})


def test_a_tokenizer_that_llama_cpp_would_misread_is_refused(converted: Converted, tmp_path: Path) -> None:
    _, folder, file = converted("llama")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="cuts text into other tokens than the model's tokenizer, near"):
        check_tokens(LlamaCpp(file, 64, 1), tmp_path, ["the end"])


def test_a_process_that_dies_becomes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dies.py").write_text(
        "import os, sys\nprint('GGML_ASSERT(x) failed', file=sys.stderr, flush=True)\nos.abort()"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ArtifactError, match=r"^it was ended by SIGABRT: GGML_ASSERT\(x\) failed$"):
        door._run("it", "dies")


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("olmoe", {"num_key_value_heads": 2}, "as many key and value heads as attention heads, this has 2 for 4"),
        ("olmoe", {"norm_topk_prob": True}, "olmoe with norm_topk_prob False only, this has True"),
        ("qwen3_moe", {"norm_topk_prob": False}, "qwen3_moe with norm_topk_prob True only, this has False"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act silu only, this has gelu"),
        ("mistral", {"sliding_window": 64}, "looks back 64 tokens of 256"),
        ("llama", {"model_type": "mamba"}, "it is a mamba model"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantized already"),
    ],
)
def test_what_llama_cpp_would_run_wrongly_is_refused(kind: str, change: dict[str, Any], words: str) -> None:
    assert words in str(door.refusal({**wide.CONFIGS[kind]().to_dict(), **change}))


def test_a_refused_export_names_the_model(tmp_path: Path, converted: Converted) -> None:
    wide.CONFIGS["olmoe"]().__class__(**{**wide.SHAPE, "norm_topk_prob": True}).save_pretrained(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"^mine cannot become a \.gguf file: llama\.cpp takes an olmoe with"):
        door.convert(tmp_path / "mine", tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="'Q9' is no type of a tensor"):
        door.quantize(converted("llama")[2], tmp_path / "x.gguf", "q8_0", tmp_path, overrides={"x": "Q9"})


def test_bf16_weights_arrive_unchanged(converted: Converted, tmp_path: Path) -> None:
    from gguf import GGUFReader

    from hpc.shrink.gguf_convert import convert

    model, folder, _ = converted("llama")
    bf16 = type(model)(model.config).to(torch.bfloat16)
    bf16.load_state_dict(model.state_dict())
    bf16.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    convert(tmp_path, tmp_path / "bf16.gguf", "bf16")
    quantize(tmp_path / "bf16.gguf", tmp_path / "f16.gguf", "q8_0", 1, {".": "F32"}, {})
    found = next(t for t in GGUFReader(str(tmp_path / "f16.gguf")).tensors if t.name == "blk.0.ffn_down.weight")
    wanted = bf16.model.layers[0].mlp.down_proj.weight.detach().float().numpy()
    assert np.array_equal(found.data.view(np.float32).reshape(wanted.shape), wanted)
