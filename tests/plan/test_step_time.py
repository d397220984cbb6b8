"""The step-time model: shapes against published counts, and what any such model must satisfy."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc.config import Model, Router
from hpc.errors import ConfigError
from hpc.plan import catalogue
from hpc.plan.constants import Constants, constants, names
from hpc.plan.flops import training_flops_per_token
from hpc.plan.hardware import ACCELERATORS, Accelerator, find
from hpc.plan.params import count
from hpc.plan.shapes import of_ours
from hpc.plan.step_time import PRECISIONS, Layout, step_time

DENSE = catalogue.find("Llama 3 70B")
MOE = catalogue.find("DeepSeek-V3")
LAYOUT = Layout(gpus=256, seq=4096, global_batch=1024, micro_batch=1, tensor=2, pipeline=4, virtual=2, expert=32)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("Llama 3.1 8B", 8.03, None), ("LLAMA3.1_405B", 405, None), ("Mixtral 8x7B", 46.7, 12.9),
        ("Qwen3-235B-A22B", 235, 22), ("Qwen3_30B_a3B", 30.5, 3.3), ("DeepSeek-V3", 671, 37), ("Kimi K2", 1026, 32.6),
        ("gpt-oss 120b", 117, 5.1), ("gpt oss 20b", 20.9, 3.6), ("GPT3 175B", 175, None), ("OLMoE", 6.9, 1.3),
    ],
)  # fmt: skip
def test_known_models_have_the_parameters_that_their_cards_state(
    name: str, billions: float, active: float | None
) -> None:
    shape = catalogue.find(name)
    assert (shape.dense_parameters + shape.expert_parameters) / 1e9 == pytest.approx(billions, rel=0.03)
    if active is not None:
        assert shape.active_matrices / 1e9 == pytest.approx(active, rel=0.12)  # cards differ on embeddings


@pytest.mark.parametrize(
    ("name", "seq", "causal", "giga_flops"),
    [
        ("DeepSeekV3", 4096, True, 260), ("LLAMA3.1_405B", 8192, True, 2525), ("LLAMA3_70B", 8192, True, 449),
        ("LLAMA3_70B", 8192, False, 481), ("LLAMA3_8B", 8192, True, 51.5), ("Qwen3_30B_a3B", 4096, True, 23.0),
        ("Qwen3_235B_a22B", 4096, True, 148), ("Kimi_K2", 4096, True, 204.6), ("GPT3-175B", 2048, False, 1077),
        ("Nemotron-340B", 4096, False, 2105),
    ],
)  # fmt: skip
def test_flops_per_token_are_those_behind_published_tflops(
    name: str, seq: int, causal: bool, giga_flops: float
) -> None:
    """TFLOP/s/GPU over tokens/s/GPU of one row (NVIDIA-NeMo/Megatron-Bridge, NVIDIA/NeMo: performance summaries)."""
    assert catalogue.find(name).training_flops(seq, causal) / 1e9 == pytest.approx(giga_flops, rel=0.02)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("GPT 22B", 22),
        ("MPT-7B", 7),
        ("Some-13B", 13),
        ("Foo 8x7B", 46.7),
        ("Bar-120B-A12B", 120),
        ("125M model", 0.125),
    ],
)
def test_an_unknown_model_gets_a_standard_shape_of_its_size(name: str, billions: float) -> None:
    shape = catalogue.find(name)
    assert (shape.dense_parameters + shape.expert_parameters) / 1e9 == pytest.approx(billions, rel=0.25)


def test_a_name_without_a_size_is_told_what_to_do() -> None:
    with pytest.raises(ConfigError, match="frobnicate"):
        catalogue.find("frobnicate")


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_our_own_models_have_the_flops_and_parameters_of_the_plan(dense_layers: int) -> None:
    model = Model(
        architecture="deepseek_v3" if dense_layers else "qwen3_moe",
        hidden_size=96, num_layers=3, num_attention_heads=4, num_key_value_heads=4 if dense_layers else 2,
        expert_size=80, num_dense_layers=dense_layers,
    )  # fmt: skip
    router = Router(num_experts=6, top_k=2)
    shape, counted = of_ours(model, router, 1000), count(model, router, 1000)
    assert shape.expert_parameters == counted.experts
    assert shape.active_matrices == counted.active_matrices
    assert shape.training_flops(64, causal=False) == training_flops_per_token(model, router, 1000, 64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DGX-GB200", "GB200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("A100 40GB", "A100-40GB"), ("mi300x", "MI300X"),
        ("H100 SXM5", "H100"), ("h100_80gb", "H100"), ("AMD Instinct MI355X", "MI355X"), ("GB300 NVL72", "GB300"),
    ],
)  # fmt: skip
def test_accelerators_are_found_by_the_names_that_people_write(name: str, expected: str) -> None:
    assert find(name).name == expected


def test_sides_that_are_no_whole_tiles_cost_as_the_next_whole_ones() -> None:
    """Nemotron 3 Nano's 1856 is computed as 2048, its 2688 as 2816: results are w, t and w t times larger."""
    nano, h100 = catalogue.find("Nemotron 3 Nano"), ACCELERATORS["H100"]
    c = replace(Constants(), operand_bytes=1e-9, row_bytes=1e-9)
    layout = Layout(gpus=1, seq=8192, global_batch=8, micro_batch=8)
    wide, tall = 2048 / 1856, 2816 / 2688
    flops = 6.0 * 23 * 6 * 2 * 2688 * 1856 * 8 * 8192
    expected = flops * (wide + tall + wide * tall) / 3 / (h100.peak("bf16") * c.gemm_hopper * c.grouped)
    assert step_time(nano, layout, h100, c).parts["experts"] == pytest.approx(expected, rel=1e-6)


def test_attention_without_flash_attention_waits_for_memory() -> None:
    """GPT 1.7B: 24 layers x 24 heads x 2048 keys (half of them masked), 15 passes of two bytes."""
    gpt = catalogue.find("GPT 1.7B (h=2304 L=24 a=24 V=51200)")
    fused = Layout(gpus=1, seq=2048, global_batch=1, micro_batch=1)
    more = [
        step_time(gpt, replace(fused, unfused=flag), ACCELERATORS["A100"]).parts["attention"] for flag in (False, True)
    ]
    assert more[1] - more[0] == pytest.approx(24 * 24 * 2048 * 2048 * 15 * 2 / 2.039e12)


def test_a_rack_keeps_64_experts_on_its_fast_links() -> None:
    wide = replace(LAYOUT, tensor=1, pipeline=1, expert=64)
    rack, nodes = ACCELERATORS["GB200"], replace(ACCELERATORS["GB200"], domain=8)
    inside = step_time(MOE, wide, rack).parts["expert parallel"]
    assert inside < step_time(MOE, wide, nodes).parts["expert parallel"] / 2


def test_host_time_shows_where_the_accelerator_is_done_sooner() -> None:
    """Tiny products: an MoE layer's starts are all there is; in a rack a part of them."""
    layout = Layout(gpus=8, seq=128, global_batch=8, micro_batch=1, expert=8)
    tiny, c = catalogue.find("Qwen3_30B_a3B"), Constants()
    starts = 48e-6 * (c.layer_us + c.moe_us + c.expert_us * 128 / 8)
    for name, expected in (("B200", starts), ("GB200", c.rack_host * starts)):
        parts = step_time(tiny, layout, ACCELERATORS[name], c).parts
        work = sum(
            value for part, value in parts.items() if part not in ("optimizer", "data parallel", "scale", "head")
        )
        assert work == pytest.approx(expected, rel=0.1)


def test_the_bubble_is_that_of_interleaved_1f1b() -> None:
    parts = step_time(DENSE, LAYOUT, ACCELERATORS["H100"], Constants()).parts
    stages, virtual, micro_batches = 4, 2, 1024 / 32  # 256 ranks over tensor 2 x pipeline 4
    work = sum(value for name, value in parts.items() if name not in ("bubble", "data parallel", "optimizer", "scale"))
    assert parts["bubble"] / work == pytest.approx((stages - 1) / (virtual * micro_batches))


def test_a_compute_bound_product_runs_at_the_fitted_part_of_the_peak() -> None:
    """Huge rows and whole tiles: FLOPs over rate, nothing else."""
    shape = replace(DENSE, vocab=256)
    layout = Layout(gpus=1, seq=8192, global_batch=64, micro_batch=64)
    c = replace(Constants(), operand_bytes=1e-9, row_bytes=1e-9)
    flops = 6.0 * (shape.dense_parameters - 2 * shape.hidden * shape.vocab) * 64 * 8192
    expected = flops / (ACCELERATORS["H100"].peak("bf16") * c.gemm_hopper)
    assert step_time(shape, layout, ACCELERATORS["H100"], c).parts["products"] == pytest.approx(expected, rel=1e-6)


hardware = st.sampled_from(sorted(ACCELERATORS.values(), key=lambda item: item.name))
layouts = st.builds(
    Layout, gpus=st.sampled_from([64, 512]), seq=st.sampled_from([2048, 8192]),
    global_batch=st.sampled_from([64, 2048]), micro_batch=st.sampled_from([1, 4]),
    tensor=st.sampled_from([1, 8]), pipeline=st.sampled_from([1, 4]), virtual=st.sampled_from([1, 2]),
    context=st.sampled_from([1, 2]), expert=st.sampled_from([1, 8, 16]),
    zero_stage=st.sampled_from([0, 1, 3]), recompute=st.sampled_from(["none", "selective", "full"]),
    precision=st.sampled_from(PRECISIONS), eager=st.booleans(),
)  # fmt: skip
models = st.sampled_from([DENSE, MOE, catalogue.find("Nemotron 3 Nano"), catalogue.find("gpt-oss 20b")])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model=models, layout=layouts, machine=hardware)
def test_a_better_machine_is_never_slower_and_parts_add_up(model: object, layout: Layout, machine: Accelerator) -> None:
    assert isinstance(model, type(DENSE))
    before = step_time(model, layout, machine)
    assert before.seconds == pytest.approx(sum(before.parts.values()))
    assert all(value >= 0 for value in before.parts.values())
    for better in (
        {"hbm_bytes_per_s": 2 * machine.hbm_bytes_per_s},
        {"link_bytes_per_s": 2 * machine.link_bytes_per_s},
        {"network_bytes_per_s": 2 * machine.network_bytes_per_s},
        {"exponentials_per_s": 2 * machine.exponentials_per_s},
        {"flops": {form: 2 * peak for form, peak in machine.flops.items()}},
    ):
        assert step_time(model, layout, replace(machine, **better)).seconds <= before.seconds * (1 + 1e-9), better


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model=models, layout=layouts, machine=hardware)
def test_more_work_is_never_faster(model: object, layout: Layout, machine: Accelerator) -> None:
    assert isinstance(model, type(DENSE))
    layout = replace(layout, recompute="none")
    before = step_time(model, layout, machine).seconds
    for more in ({"recompute": "full"}, {"global_batch": 2 * layout.global_batch}):
        assert step_time(model, replace(layout, **more), machine).seconds >= before * (1 - 1e-9), more


def test_the_file_of_constants_has_each_constant_for_each_group() -> None:
    for values in ({}, *_all_sets()):
        assert set(values) <= set(names())
    assert all(set(values) == set(names()) for values in _all_sets())
    assert all(value > 0 for values in _all_sets() for value in values.values())
    assert constants() == constants(_all_sets()[0])


def _all_sets() -> list[dict[str, float]]:
    from hpc.plan.constants import fitted

    found = fitted()
    return [found["all"], *found["without_source"].values(), *found["without_hardware"].values()]
