"""`launch.py fit`: bytes against published and real files, memory, speed against measurements, costs, refusals."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from hpc.errors import ConfigError, DataError
from hpc.plan.catalogue import SHAPES, plain_name
from hpc.plan.inference import cost, gguf_file, machines, speed
from hpc.plan.inference.assess import assess
from hpc.plan.inference.cache import cache_bytes, longest_context, overhead_bytes
from hpc.plan.inference.config_shape import of_config
from hpc.plan.inference.formats import FORMATS, size
from hpc.plan.inference.gguf_mixes import tensor_type
from hpc.plan.inference.show import advice, render
from hpc.plan.inference.subject import Subject, find
from hpc.plan.inference.tensors import tensors
from hpc.plan.quantity import GIB
from hpc.plan.shapes import Shape
from tests.conftest import Launch

MIXTRAL = SHAPES["mixtral8x7b"]
COSTS = cost.read_costs()

# Bytes ----------------------------------------------------------------------------------------------------------------

PUBLISHED = {
    # https://huggingface.co/bartowski/Mixtral-8x22B-v0.1-GGUF (llama.cpp b2636), GB
    "mixtral8x22b": {"q5_k_m": 99.96, "q4_k_m": 85.58, "iq4_xs": 76.35, "q3_k_m": 67.78, "q2_k": 52.10},
    # https://github.com/ggml-org/llama.cpp/pull/4406: those whose mix is still the same
    "mixtral8x7b": {"q8_0": 46.22 * 1.0737418, "q6_k": 35.74 * 1.0737418, "q4_0": 24.62 * 1.0737418},
    # bartowski's Qwen3-30B-A3B (b5200), as listed by model.aibase.com
    "qwen330ba3b": {"bf16": 61.10, "q8_0": 32.48, "q6_k": 25.10, "q5_k_m": 21.74},
    # https://huggingface.co/bartowski/deepseek-ai_DeepSeek-V3-0324-GGUF (b4944)
    "deepseekv3womtp": {"q8_0": 713.29, "q6_k": 550.80, "q5_k_m": 475.40, "q4_k_m": 404.43},
    # https://github.com/ggml-org/llama.cpp/pull/6936, GiB
    "llama38b": {
        "q8_0": 7.96 * 1.0737418, "q6_k": 6.14 * 1.0737418, "q5_k_m": 5.33 * 1.0737418, "q4_k_m": 4.58 * 1.0737418,
    },
    # XiongjieDai/GPU-Benchmarks-on-LLM-Inference README.md @ 00dd2bd, GiB
    "llama370b": {
        "q8_0": 69.83 * 1.0737418, "q6_k": 53.91 * 1.0737418, "q5_k_m": 46.52 * 1.0737418, "q4_k_m": 39.60 * 1.0737418,
        "q3_k_m": 31.91 * 1.0737418, "q2_k": 24.56 * 1.0737418,
    },
}  # fmt: skip


def test_sizes_are_those_of_published_files() -> None:
    """26 files of six models: within 0.35 %, half of them within 0.1 %; what is listed has three to five digits."""
    errors = {
        (model, mix): size(SHAPES[model], FORMATS[mix if mix == "bf16" else f"gguf-{mix}"]).weights / (1e9 * gb) - 1
        for model, files in PUBLISHED.items()
        for mix, gb in files.items()
    }
    assert len(errors) == 26
    assert max(map(abs, errors.values())) < 0.0035, errors
    assert median(map(abs, errors.values())) < 0.001


def test_sizes_are_those_of_files_that_llama_cpp_made() -> None:
    """MB of files of a small Mixtral, made by llama.cpp (llama-cpp-python 0.3.36): tokenizer and header are 50 kB."""
    shape = Shape(hidden=256, vocab=1024, attention_layers=4, heads=8, kv_heads=4, head_dim=32, moe_layers=4, experts=8,
                  top_k=2, expert_size=512)  # fmt: skip
    made = {"bf16": 27.86, "gguf-q8_0": 14.83, "gguf-q6_k": 11.53, "gguf-q5_k_m": 10.04, "gguf-q4_k_m": 8.66,
            "gguf-iq4_xs": 7.71, "gguf-q4_0": 8.09, "gguf-q3_k_m": 6.93, "gguf-q2_k": 5.47}  # fmt: skip
    for form, mb in made.items():
        assert 0.02e6 < mb * 1e6 - size(shape, FORMATS[form]).weights < 0.06e6, form


def test_mixes_give_sensitive_tensors_more_bits() -> None:
    found = {(t.role, t.layer): tensor_type("q4_k_m", t, MIXTRAL) for t in tensors(MIXTRAL)}
    assert [found[role, 0] for role in ("q", "k", "v", "output", "router", "head", "embedding")] == [
        "Q4_K", "Q8_0", "Q8_0", "Q5_K", "F32", "Q6_K", "Q4_K",
    ]  # fmt: skip
    assert [found["down", layer] for layer in (3, 4, 5, 6, 27, 28)] == ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K", "Q6_K"]
    lite = SHAPES["deepseekv2lite"]
    narrow = {(t.role, t.inputs): tensor_type("q6_k", t, lite) for t in tensors(lite)}
    assert narrow["down", 1408] == narrow["latent", 128] == "Q8_0", "rows that do not divide by 256 fall back"


def test_a_token_reads_its_experts_and_no_embedding() -> None:
    held = size(MIXTRAL, FORMATS["bf16"])
    experts = 32 * 3 * 4096 * 14336
    assert held.parameters == pytest.approx(46.70e9, rel=1e-3)
    assert held.read == pytest.approx(held.weights - 2 * (6 * experts + 32000 * 4096))
    tied = replace(MIXTRAL, tied=True)
    assert size(tied, FORMATS["bf16"]).read == held.read


@pytest.mark.parametrize(("form", "bits"), [("mlx-4bit", 4.5), ("mlx-8bit", 8.5), ("int4", 4.125), ("int8", 8.125)])
def test_groups_cost_their_scales(form: str, bits: float) -> None:
    expert = next(tensor for tensor in tensors(MIXTRAL) if tensor.role == "up")
    assert FORMATS[form].bits(expert, MIXTRAL) == bits
    assert bits <= size(MIXTRAL, FORMATS[form]).bits_per_weight < bits + 0.1


# Shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("olmoe", {"num_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 96, "mlp_only_layers": [0], "head_dim": 48}),
        ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 64}),
        ("deepseek_v3", {"n_routed_experts": 4, "moe_intermediate_size": 96, "first_k_dense_replace": 1, "n_group": 1,
                         "topk_group": 1, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 24,
                         "qk_rope_head_dim": 8, "v_head_dim": 24}),
        ("llama", {"tie_word_embeddings": True}),
    ],
)  # fmt: skip
def test_matrices_are_those_that_transformers_builds(kind: str, more: dict[str, Any]) -> None:
    """Biases, and norms that we count once for each block, aside."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, hidden_size=128, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=512,
        num_key_value_heads=4 if kind == "deepseek_v3" else 2, num_experts_per_tok=2, **more,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    built = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "shared_expert_gate" not in n)
    shape, context = of_config(config.to_dict(), "config.json")
    assert sum(t.parameters for t in tensors(shape) if t.role != "norm") == built
    assert context == config.max_position_embeddings


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(DataError, match="mamba"):
        of_config({"model_type": "mamba"}, "config.json")
    with pytest.raises(DataError, match="hidden_size"):
        of_config({"model_type": "llama", "num_hidden_layers": 2}, "config.json")


def test_windows_are_read_as_each_family_means_them() -> None:
    base = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    listed = ["sliding_attention", "full_attention"] * 2
    cases: list[tuple[dict[str, Any], int]] = [
        ({"model_type": "mistral", "sliding_window": 16}, 4), ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "qwen3", "sliding_window": 16, "use_sliding_window": False}, 0),
        ({"model_type": "gpt_oss", "sliding_window": 16, "layer_types": listed, "num_local_experts": 2}, 2),
    ]  # fmt: skip
    for more, windowed in cases:
        shape, _ = of_config({**base, **more}, "config.json")
        assert shape.windowed_layers == windowed
        per_token = 2 * shape.kv_heads * 2 * shape.head_dim
        assert cache_bytes(shape, 100) == per_token * ((4 - windowed) * 100 + windowed * 16)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_the_cache_is_small_for_grouped_queries_and_smaller_for_latent_attention() -> None:
    assert cache_bytes(MIXTRAL, 32768) == 4 * GIB
    assert cache_bytes(SHAPES["deepseekv3womtp"], 1) == 61 * 576 * 2
    left = 3 * GIB + 1000
    assert longest_context(MIXTRAL, left, None) == left // 131072
    assert longest_context(MIXTRAL, 9 * GIB, 32768) == 32768
    assert longest_context(MIXTRAL, -1, 32768) == 0


@pytest.mark.parametrize(
    ("gib", "usable_mib"), [(16, 10922.67), (32, 21845.34), (64, 49152), (96, 73728)],
)  # fmt: skip
def test_a_macs_gpu_gets_what_metal_reported(gib: int, usable_mib: float) -> None:
    machine = machines.machines("M2 Max" if gib > 16 else "M2", gib, None)[0]
    assert machine.usable / 2**20 == pytest.approx(usable_mib, abs=0.02)
    assert machine.usable < machine.raised <= machine.memory - 4 * GIB


def test_memory_alone_means_an_m2_and_with_a_bandwidth_any_machine() -> None:
    assert [m.name for m in machines.machines(None, 64, None)] == ["M2 Max 64 GiB"]
    other = machines.machines(None, 64, 90e9)[0]
    assert (other.kind, other.usable / GIB) == ("cpu", 60)
    assert machines.machines(None, 12, None)[0].bandwidth is None
    assert len(machines.machines("apple m4 max", None, None)) == len(machines.APPLE["M4 Max"].memory_gib)
    assert machines.machines("NVIDIA H100", None, None)[0].kind == "gpu"


def test_words_for_memory_and_bandwidth() -> None:
    assert [machines.memory_gib(word) for word in ("16GiB", "16 GB", "16", "512MiB", "0.5tb")] == [16, 16, 16, 0.5, 512]
    assert [machines.bandwidth(word) for word in ("100GB/s", "100", "1.2TB/s")] == [1e11, 1e11, 1.2e12]
    for read in (machines.memory_gib, machines.bandwidth):
        for word in ("", "many", "-1", "0", "1e9", "16 GiB/h"):
            with pytest.raises(ConfigError, match="--"):
                read(word)


def test_a_47b_in_four_bits_wants_an_m2_max_or_a_raised_limit() -> None:
    subject = find("mistralai/Mixtral-8x7B-v0.1")
    fits = [assess(subject, machine, 8192, COSTS) for machine in machines.machines(None, None, None)]
    verdicts = [row.fits for fit in fits if (row := fit.row("gguf-q4_k_m")) is not None]
    assert verdicts == ["does not fit"] * 3 + ["fits with a raised limit"] + ["fits"] * 3
    page = render(fits, COSTS)
    assert "M2 Pro 32 GiB: take gguf-q4_k_m" in page
    assert "iogpu.wired_limit_mb=28672" in page
    assert "in four bits (gguf-q4_k_m, 26.5 GiB of weights): from M2 Max 64 GiB up" in page
    row = fits[3].row("gguf-q4_k_m")
    assert row is not None
    assert row.total == row.size.weights + GIB + overhead_bytes(MIXTRAL)
    assert row.total + (row.longest_context - 8192) * 131072 <= fits[3].machine.raised < row.total + 9264 * 131072


def test_advice_takes_eight_bits_where_they_fit_and_says_what_few_bits_mean() -> None:
    roomy = assess(find("olmoe-1b-7b"), machines.machines("M2", 24, None)[0], 4096, COSTS)
    assert roomy.recommended is not None
    assert roomy.recommended.format == "gguf-q8_0"
    assert "of other models +0.028 to +0.069 %" in advice(roomy, COSTS)
    tight = assess(find("qwen3-30b-a3b"), machines.machines("M2", 16, None)[0], 4096, COSTS)
    assert "2.9 bits are few" in advice(tight, COSTS)
    none = assess(find("deepseek-v3"), machines.machines("M2", 8, None)[0], 4096, COSTS)
    assert "cannot hold it" in advice(none, COSTS)
    server = assess(find("mixtral-8x7b"), machines.machines("H100", None, None)[0], 4096, COSTS)
    assert "`kind: quantize`, `bits: 8`" in advice(server, COSTS)
    assert not any(row.format.startswith("mlx") for row in server.rows)


# Speed ----------------------------------------------------------------------------------------------------------------


def facts(row: speed.Measurement) -> tuple[float, float, float, float]:
    """Bytes per token, layers, bandwidth in bytes/s, measured tokens/s."""
    shape = SHAPES[plain_name(row.model)]
    read = speed.bytes_per_token(shape, size(shape, FORMATS[row.format]), row.context)
    return read, speed.layers(shape), row.bandwidth, row.tokens_per_s


def off(rows: list[speed.Measurement], part: Any, layer_s: Any) -> Any:
    """log(predicted / measured), rows first."""
    read, layers, bandwidth, measured = (np.array(column)[:, None] for column in zip(*map(facts, rows), strict=True))
    return np.log(1 / (read / (part * bandwidth) + layers * layer_s) / measured)


def fit(rows: list[speed.Measurement]) -> tuple[float, float]:
    """The two constants with the least sum of |log ratio|, by trying all."""
    parts, seconds = (grid.ravel() for grid in np.meshgrid(np.arange(0.5, 1.001, 0.01), np.arange(0, 3e-4, 5e-6)))
    best = int(np.abs(off(rows, parts, seconds)).sum(0).argmin())
    return float(parts[best]), float(seconds[best])


@pytest.mark.parametrize("kind", ["apple", "gpu"])
def test_what_runtimes_reach_is_the_fit_of_the_measurements(kind: Any) -> None:
    rows = [row for row in speed.measurements() if row.kind == kind and row.fitted]
    told = speed.REACHED[kind]
    assert (told.part, told.layer_s) == pytest.approx(fit(rows))
    errors = np.sort(np.abs(np.expm1(off(rows, told.part, told.layer_s)[:, 0])))
    assert told.rows == len(errors)
    assert median(errors) == pytest.approx(told.median_error, abs=0.005)
    assert errors[int(0.9 * len(errors))] == pytest.approx(told.within, abs=0.01)
    elsewhere: list[float] = []
    for device in {row.device for row in rows}:
        constants = fit([row for row in rows if row.device != device])
        elsewhere += list(np.abs(np.expm1(off([row for row in rows if row.device == device], *constants)[:, 0])))
    assert median(elsewhere) == pytest.approx(told.left_out, abs=0.005)


def test_nothing_published_is_faster_than_the_bound() -> None:
    for row in speed.measurements():
        read, _, bandwidth, measured = facts(row)
        assert measured < bandwidth / read, row


def test_the_laptop_cpus_part_is_that_of_its_measurement() -> None:
    (row,) = (row for row in speed.measurements() if row.kind == "cpu")
    read, _, bandwidth, measured = facts(row)
    assert speed.REACHED["cpu"].part == pytest.approx(measured * read / bandwidth, abs=0.005)


def test_measurements_of_the_very_model_and_chip_are_shown() -> None:
    fit = assess(find("mixtral-8x7b"), machines.machines("M2 Max", 96, None)[0], 8192, COSTS)
    assert "gguf-q4_k_m 34.7, gguf-q4_0 36.7" in render([fit], COSTS)
    assert speed.measured("mixtral-8x7b", machines.machines("M2", 24, None)[0]) == []
    assert len(speed.measured("Llama 2 7B", machines.machines("M3", 16, None)[0])) == 1
    assert len(speed.measured("Llama 2 7B", machines.machines("M3 Max", 64, None)[0])) == 2


def test_without_a_bandwidth_there_is_no_speed() -> None:
    fit = assess(find("mixtral-8x7b"), machines.machines(None, 40, None)[0], 8192, COSTS)
    for row in fit.rows:
        assert row.bound.value is row.expected.value is None
        assert row.bound.how.startswith("unknown:")
    assert "tokens/s (est" not in advice(fit, COSTS)


# Costs ----------------------------------------------------------------------------------------------------------------


def test_published_costs_are_found_by_any_name_of_the_model_and_never_guessed() -> None:
    found = cost.of(COSTS, "mistralai/Mixtral-8x7B-v0.1", "gguf-q4_k_m")
    assert sorted(round(one.ppl_ratio, 4) for one in found) == [1.0147, 1.0232, 1.0359]
    assert cost.of(COSTS, "qwen3-30b-a3b", "gguf-q4_k_m") == []
    assert all(one.format in FORMATS and one.source.startswith("http") for one in COSTS)


def test_own_rows_are_read_and_bad_ones_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "costs.csv"
    head = "model,format,ppl_ratio,source,measured_by\n"
    path.write_text(head + "SmolLM2-135M,int4,1.019,bench shrink,us\n")
    (own,) = cost.read_costs(path)
    assert (own.bits_per_weight, own.ppl_ratio) == (None, 1.019)
    for line, word in (("M,int4,,s,us", "ppl_ratio"), ("M,int4,x,s,us", "numbers"), ("M,int4,nan,s,us", "numbers")):
        path.write_text(head + "M,int4,1.0,s,us\n" + line + "\n")
        with pytest.raises(DataError, match=f"costs.csv:3.*{word}"):
            cost.read_costs(path)
    with pytest.raises(DataError, match="cannot be read"):
        cost.read_costs(tmp_path / "nothing.csv")


def test_a_run_tells_what_its_own_formats_cost(tmp_path: Path) -> None:
    def receipt(stage: str, **content: Any) -> None:
        (tmp_path / "stages" / stage).mkdir(parents=True)
        (tmp_path / "stages" / stage / "receipt.json").write_text(json.dumps(content))

    texts = {"merge": {"law": {"perplexity": 20.0}}, "small": {"law": {"perplexity": 21.0}}}
    receipt("small", kind="quantize", config={"bits": 4}, inputs={"merge": "x", "law": "y"})
    receipt("gguf", kind="export", config={"format": "gguf-q4_k_m"}, inputs={"merge": "x"})
    receipt("evaluate", kind="evaluate", config={}, inputs={}, metrics={"models": texts})
    (tmp_path / "stages" / "torn").mkdir()
    (tmp_path / "stages" / "torn" / "receipt.json").write_text('{"kind": "quant')
    (found,) = cost.measured_in_run(tmp_path, "merge")
    assert (found.format, found.ppl_ratio, found.text) == ("int4", 1.05, "law")


# What MODEL may be ----------------------------------------------------------------------------------------------------


def a_folder(path: Path, **more: Any) -> Path:
    path.mkdir(parents=True)
    config = {"model_type": "mixtral", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2,
              "vocab_size": 1000, "max_position_embeddings": 4096, **more}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_folder_and_a_stage_of_a_run_are_models(tmp_path: Path) -> None:
    shape = find(str(a_folder(tmp_path / "model"))).shape
    a_folder(tmp_path / "run" / "stages" / "merge" / "artifact")
    for subject in (find(str(tmp_path / "run"), "merge"), find(str(tmp_path / "run" / "stages" / "merge"))):
        assert (subject.name, subject.shape, subject.context) == ("merge", shape, 4096)
    (tmp_path / "run" / "stages" / "lora" / "artifact").mkdir(parents=True)
    (tmp_path / "run" / "stages" / "lora" / "artifact" / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="adapters"):
        find(str(tmp_path / "run" / "stages" / "lora"))
    with pytest.raises(ConfigError, match="models of this run: merge"):
        find(str(tmp_path / "run"))


def test_a_quantized_folder_is_shown_as_it_is(tmp_path: Path) -> None:
    groups = {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}
    stated = {"quant_method": "compressed-tensors", "config_groups": groups}
    folder = a_folder(tmp_path / "q", quantization_config=stated)
    (folder / "model.safetensors").write_bytes(bytes(3_000_000))
    fit = assess(find(str(folder)), machines.machines("H100", None, None)[0], 4096, COSTS)
    (row,) = fit.rows
    assert (row.format, row.size.weights) == ("int4", 3_000_000)
    assert row.size.read < 3_000_000
    assert len(assess(find(str(folder)), machines.machines("M2", 8, None)[0], 4096, COSTS).rows) > 5, (
        "it must be remade"
    )


def test_a_chain_is_a_model_before_it_is_made() -> None:
    subject = find("configs/quickstart.yaml", "pretrain")
    assert size(subject.shape, FORMATS["bf16"]).parameters == pytest.approx(9.45e6, rel=0.01)
    with pytest.raises(ConfigError, match="those that do: pretrain"):
        find("configs/quickstart.yaml", "report")


def test_a_gguf_file_says_its_own_bytes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Mixtral 8x7B")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(512)
    writer.add_expert_count(4)
    writer.add_expert_used_count(1)
    writer.add_file_type(15)
    writer.add_token_list(["a", "é", "c"])
    writer.add_tensor("token_embd.weight", np.zeros((3, 64), np.float32))
    writer.add_tensor("output.weight", np.zeros((3, 64), np.float16))
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((4, 32, 64), np.float16))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    found = gguf_file.read(path)
    assert (found.name, found.context, found.format) == ("Mixtral 8x7B", 512, "gguf-q4_k_m")
    assert (found.size.weights, found.size.read) == (768 + 384 + 16384, 384 + 4096)
    assert found.shape.vocab == 3
    subject = find(str(path))
    assert [row.format for row in assess(subject, machines.machines("M2", 8, None)[0], 512, COSTS).rows] == [
        "gguf-q4_k_m"
    ]
    whole = path.read_bytes()
    for damaged in (whole[:100], b"GGML" + whole[4:], whole[:-16384], whole[:8] + struct.pack("<Q", 2**60)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"small\.gguf"):
            gguf_file.read(path)


@pytest.mark.parametrize(
    "word", ["./nope", "owner/unknown", "mixtral-9x7b", "README.md", "tests", "nope.gguf", "nope.yaml", ""],
)  # fmt: skip
def test_what_is_no_model_is_refused(word: str) -> None:
    with pytest.raises((ConfigError, DataError)):
        find(word)


def test_names_that_users_type_are_known() -> None:
    for name in (
        "mixtral-8x7b",
        "qwen3-30b-a3b",
        "olmoe-1b-7b",
        "allenai/OLMoE-1B-7B-0924",
        "deepseek-v3",
        "Llama 3 8B",
    ):
        assert isinstance(find(name), Subject)
    assert find("deepseek-v3").shape.attention_layers == 61, "multi-token prediction is not run"


# The verb -------------------------------------------------------------------------------------------------------------


def test_the_verb_prints_a_table_and_one_sentence(launch: Launch) -> None:
    result = launch("fit", "mixtral-8x7b", "--memory", "64GiB", "--context", "4096")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.strip().splitlines()
    assert all(any(line.startswith(form) for line in lines) for form in ("bf16", "gguf-q4_k_m", "mlx-mixed_4_6"))
    assert lines[-1].startswith("M2 Max 64 GiB: take gguf-q8_0")
    assert "`kind: export`, `format: gguf-q8_0`" in lines[-1]


def test_json_has_every_figure_with_how_it_came_about(launch: Launch) -> None:
    told = json.loads(launch("fit", "mixtral-8x7b", "--device", "M2 Max", "--json").stdout)
    assert [machine["machine"]["memory"] / GIB for machine in told["machines"]] == [32, 64, 96]
    row = next(row for row in told["machines"][1]["rows"] if row["format"] == "gguf-q4_k_m")
    assert row["bound"]["how"].startswith("derived:")
    assert row["expected"]["how"].startswith("estimated:")
    assert {one["measured_by"] for one in row["costs"]} == {"ikawrakow", "brozkrut"}


def test_bad_input_is_one_line(launch: Launch) -> None:
    for arguments, word in ((("mixtral-9x7b",), "mixtral8x7b"), (("mixtral-8x7b", "--device", "M9"), "M4")):
        result = launch("fit", *arguments)
        assert result.returncode == ConfigError.exit_code
        assert len(result.stderr.strip().splitlines()) == 1
        assert word in result.stderr
