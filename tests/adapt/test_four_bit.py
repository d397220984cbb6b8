"""A base in four bits under LoRA: packed rightly, really packed, computed with exactly, alike in every layout."""

import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, Qwen2Config

from hpc.adapt.lora import attach, base_name
from hpc.config.train import AdapterTraining, ReloraTraining
from hpc.errors import ConfigError
from hpc.model import four_bit
from hpc.model.build import empty_model, load_config, load_model
from hpc.model.experts import use_backend
from hpc.model.four_bit import FourBitMatrix
from hpc.model.packing import bits_per_weight, hollow, pack, packed_matrices, settle
from hpc.reuse.stored import StoredModel
from hpc.train.fragments import logical_name
from tests.adapt.packed import SAVED
from tests.adapt.test_merge import LATENT
from tests.ranks import on_ranks

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
IDS = torch.arange(40).view(1, 40) * 7 % 64
PLAIN: dict[str, Any] = {
    "rank": 3, "steps": 1, "optimizer": {"lr": 1e-3},
    "batches": {"seq_len": 8, "micro_batch_size": 1, "tokens_per_step": 8},
}  # fmt: skip
LARGEST_GAP = (1 - 0.6961928) / 2
"""Half the distance of NF4's two lowest levels, the widest: what a weight may move by, in magnitudes of its block."""


def save(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(MixtralConfig(**SHAPE, num_local_experts=4), tmp_path_factory.mktemp("moe") / "base")


def unpacked(weight: torch.Tensor) -> torch.Tensor:
    """What packing leaves of a weight."""
    matrix = FourBitMatrix(*weight.shape)
    matrix.reserve("cpu")
    matrix.pack(weight)
    return matrix.unpack(torch.float32)


@pytest.mark.parametrize("shape", [(64, 64), (32, 48), (3, 96), (7, 33), (300, 256)])
def test_packing_is_nf4_by_its_definition_and_as_bitsandbytes_unpacks_it(shape: tuple[int, int]) -> None:
    """Rows that are no multiple of a block as well: bitsandbytes 0.50.2 itself gives wrong numbers for (32, 48)."""
    torch.manual_seed(1)
    weight = torch.randn(shape) * 0.02
    flat, found = weight.flatten(), unpacked(weight)
    codes, state = bitsandbytes.functional.quantize_4bit(flat, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(found.flatten(), bitsandbytes.functional.dequantize_4bit(codes, state).flatten())
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu").tolist()
    scales = [  # of a block: an 8-bit level, times the scale of 256 blocks, and their mean
        float(state.state2.code[int(code)] * state.state2.absmax[number // 256] + state.offset)
        for number, code in enumerate(state.absmax)
    ]
    for place in range(0, flat.numel(), 13):
        packed = int(codes.flatten()[place // 2])
        code = packed >> 4 if place % 2 == 0 else packed & 15
        assert float(found.flatten()[place]) == pytest.approx(levels[code] * scales[place // 64], rel=1e-6, abs=1e-9)
        block = flat[place // 64 * 64 :][:64]
        largest = float(block.abs().max())
        rounded_scale = abs(scales[place // 64] - largest)
        error = abs(float(found.flatten()[place] - flat[place]))
        assert error <= LARGEST_GAP * largest + rounded_scale + 1e-7


def test_the_same_weight_is_packed_into_the_same_bits() -> None:
    weight = torch.randn(96, 64)
    first, second = FourBitMatrix(96, 64), FourBitMatrix(96, 64)
    for matrix, same in ((first, weight), (second, weight.clone())):
        matrix.reserve("cpu")
        matrix.pack(same)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))


def packed_model(folder: Path, settings: AdapterTraining) -> Any:
    """An adapted model on a packed base, as the engine makes it on one rank."""
    model = attach(empty_model(load_config(folder)), settings, 1)
    loaded = load_model(folder).state_dict()
    widths = hollow(model)
    settle(model, widths)
    source = StoredModel(folder)
    pack(model, lambda p, target: source.fill(logical_name(base_name(p.name) or ""), p.start, target), "cpu")
    return finished(model, loaded)


def finished(model: Any, loaded: dict[str, torch.Tensor]) -> Any:
    """The model with what is not packed, and adapters that do something."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (known := base_name(name)) is not None:
                parameter.copy_(loaded[known])
            elif ".lora_B." in name or name.endswith(".B"):
                parameter.normal_(std=0.1)
    use_backend(model, "grouped_mm")
    return model.train()


def rounded(folder: Path) -> dict[str, torch.Tensor]:
    """The base with its packed matrices unpacked, each expert's gate, up and down by itself."""
    state = load_model(folder).state_dict()
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            state[name] = torch.stack([torch.cat([unpacked(half) for half in one.chunk(2)]) for one in value])
        elif name.endswith("experts.down_proj"):
            state[name] = torch.stack([unpacked(one) for one in value])
        elif name.endswith(("_proj.weight", "_with_mqa.weight")):
            state[name] = unpacked(value)
    return state


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["experts", "dense", "latent"])
def test_logits_and_gradients_are_those_of_lora_on_the_rounded_base(
    kind: str, recompute: bool, moe: Path, tmp_path: Path
) -> None:
    dense = Qwen2Config(**SHAPE, tie_word_embeddings=True)  # its projections have biases
    latent = DeepseekV3Config(**{**SHAPE, **LATENT}, q_lora_rank=16)
    folder = moe if kind == "experts" else save({"dense": dense, "latent": latent}[kind], tmp_path / kind)
    settings = AdapterTraining.model_validate({**PLAIN, "base_bits": 4})
    packed = packed_model(folder, settings)
    plain = finished(attach(empty_model(load_config(folder)), settings, 1), rounded(folder))
    found, logits = [], []
    for model in (packed, plain):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        logits.append(model(input_ids=IDS, labels=IDS).logits)
        logits[-1].square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert float((logits[0] - logits[1]).detach().abs().max()) < 1e-5
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-3, atol=1e-6), name
        assert gradient.abs().sum() > 0, name
    assert all(p.grad is None for p in packed.parameters() if not p.requires_grad)
    with torch.no_grad():
        exact = finished(attach(empty_model(load_config(folder)), settings, 1), load_model(folder).state_dict())
        assert float((exact(input_ids=IDS).logits - logits[0]).abs().max()) > 1e-3


def test_experts_are_really_packed_and_routers_norms_and_embeddings_are_not(moe: Path) -> None:
    model = packed_model(moe, AdapterTraining.model_validate({**PLAIN, "base_bits": 4, "attention": False}))
    packed = {entry.name for entry in packed_matrices(model)}
    attention = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    wanted = attention | {f"mlp.experts.{role}" for role in ("w1", "w2", "w3")}
    assert packed == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in wanted}
    assert len(list(packed_matrices(model))) == 2 * (4 + 3 * 4)
    kept = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert kept == {name for name in load_model(moe).state_dict() if "_proj" not in name}
    matrix = FourBitMatrix(256, 512)
    matrix.reserve("cpu")
    matrix.pack(torch.randn(256, 512))
    assert matrix.nbytes == 256 * 512 // 2 + 2048 + 4 * 8 + 4  # codes, scales, their scales, their mean
    found = bits_per_weight(model)
    assert found is not None
    assert 4.125 < found < 4.2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"parallel": {"zero_stage": 3}}, "zero_stage = 3 splits weights over ranks.*take zero_stage 2"),
        ({"expert_compute": "megablocks"}, "megablocks multiplies all experts at once.*take grouped_mm"),
        ({"compile": True}, "compile = true cannot make kernels.*set compile to false"),
        ({"base_bits": 8}, "Input should be 4"),
    ],
)
def test_what_does_not_go_with_four_bits_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterTraining.model_validate({**PLAIN, "base_bits": 4, **more})


def test_relora_which_merges_into_its_base_is_refused() -> None:
    jagged = {"kind": "jagged_cosine", "restart_every_steps": 20}
    with pytest.raises(ValueError, match=r"rounds the base.*leave base_bits out, or take a lora stage"):
        ReloraTraining.model_validate({**PLAIN, "base_bits": 4, "steps": 40, "schedule": jagged})


def test_a_missing_library_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    four_bit.library.cache_clear()
    with pytest.raises(ConfigError, match=r"train.base_bits = 4 needs bitsandbytes.*pip install 'greenmoe\[qlora\]'"):
        four_bit.library()


CASES = ["2/2/4/none/save", "2/2/4/none/resume", "1/1/4/none/whole", "2/1/4/attention/whole", "1/2/4/full/whole",
         "2/1/32/none/whole"]  # fmt: skip


@pytest.fixture(scope="module")
def found(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(2, "tests.adapt.packed", tmp_path_factory.mktemp("packed") / "out.json", moe, *CASES)


def test_every_layout_packs_the_same_bits_and_has_the_same_curve(found: dict[str, Any]) -> None:
    told = [found[case] for case in CASES if "/4/" in case and "resume" not in case]
    assert {one["expert_codes"] for one in told} == {told[0]["expert_codes"]}
    for one in told[1:]:
        assert one["losses"] == pytest.approx(told[0]["losses"], abs=1e-5)
    exact = found["2/1/32/none/whole"]
    assert exact["losses"] == pytest.approx(told[0]["losses"], abs=0.05)
    assert max(abs(a - b) for a, b in zip(exact["losses"], told[0]["losses"], strict=True)) > 1e-5


def test_a_run_that_goes_on_is_the_same_to_the_bit_though_no_checkpoint_holds_the_base(found: dict[str, Any]) -> None:
    whole, resumed = found["2/2/4/none/save"], found["2/2/4/none/resume"]
    assert resumed["losses"] == whole["losses"][SAVED:]
    assert resumed["exact"] == whole["exact"]
    assert whole["checkpoint_bytes"] == found["2/1/32/none/whole"]["checkpoint_bytes"]


def test_a_rank_holds_its_own_experts_and_watches_all_it_packed(found: dict[str, Any]) -> None:
    split, whole = found["2/2/4/none/save"], found["1/1/4/none/whole"]
    assert (split["packed"], whole["packed"]) == (2 * (4 + 3 * 2), 2 * (4 + 3 * 4))
    assert (split["watched"], whole["watched"]) == (2 * (4 + 2 * 3), 2 * (4 + 3))  # one entry for each rank's experts
    assert not any("_proj" in name or ".experts." in name for name, _ in split["parameters"])


@pytest.mark.slow
def test_no_rank_ever_holds_the_base_in_full(tmp_path: Path) -> None:
    """Peak resident memory of training on 118 million weights: 472 MB in fp32, 61 MB packed."""
    shape = {**SHAPE, "hidden_size": 512, "intermediate_size": 1152, "num_hidden_layers": 8}
    folder = save(MixtralConfig(**shape, num_local_experts=8), tmp_path / "model")
    peaks = []
    for bits in ("4", "32"):
        case = f"1/1/{bits}/none/whole"
        peaks.append(on_ranks(1, "tests.adapt.packed", tmp_path / "out.json", folder, case)[case]["peak_gib"])
    weights = sum(v.numel() for name, v in load_model(folder).state_dict().items() if "_proj" in name)
    print(f"peak {peaks[0]:.3f} GiB packed, {peaks[1]:.3f} GiB in full, {weights:,} weights")
    assert 2**30 * (peaks[1] - peaks[0]) > 0.5 * (4 - 4.127 / 8) * weights  # the rest: holes in the heap
