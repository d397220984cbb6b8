"""The plan's memory: formulas by hand, and what real steps of the engine allocate."""

import json
from pathlib import Path
from typing import Any

import pytest

from hpc.bench.step import MeasuredSteps, measure_steps
from hpc.config.load import load_config
from hpc.plan.activations import activations
from hpc.plan.facts import Facts, model_facts
from hpc.plan.imbalance import Imbalance, imbalance
from hpc.plan.memory import Memory, training_memory
from hpc.plan.process import FIXED_KERNELS, KERNEL_BYTES, kernel_bytes, row_counts
from slurm.submit import RANK_ENVIRONMENT
from tests.conftest import ROOT

MIB = 2**20
EVEN = Imbalance(1.0, 1.0, 1.0, "derived: even")


def case(ranks: int, ep: int, zero: int, micro: int, recompute: str, tokens: int, *more: str) -> tuple[Any, Facts]:
    """The quickstart's pretraining in another layout."""
    at = "stages.pretrain.train"
    config = load_config(
        ROOT / "configs/quickstart.yaml",
        [f"{at}.parallel={{ranks_per_node: {ranks}, expert_parallel_size: {ep}, zero_stage: {zero}}}",
         f"{at}.batches={{seq_len: 256, micro_batch_size: {micro}, tokens_per_step: {tokens}}}",
         f"{at}.recompute={recompute}", *more],
    )  # fmt: skip
    facts = model_facts(config, "pretrain")
    assert facts is not None
    return config.stage("pretrain").train, facts


def planned(settings: Any, facts: Facts, load: Imbalance | None = None) -> Memory:
    return training_memory(facts, settings, "fp32", on_cpu=True, load=load)


def sizes(parts: tuple[Any, ...]) -> dict[str, float]:
    return {part.name: part.bytes for part in parts}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((2, 2, 1, 4, "none", 2048), id="quickstart"),
        pytest.param((1, 1, 2, 2, "full", 1024), id="zero 2, recompute, accumulation"),
    ],
)
def test_planned_tensors_are_those_that_real_steps_allocate(layout: Any) -> None:
    settings, facts = case(*layout)
    found = measured(settings, facts, steps=1, count_tensors=True)
    assert found.tensor_bytes is not None
    assert planned(settings, facts).tensors == pytest.approx(max(found.tensor_bytes), rel=0.1)


def test_planned_memory_is_what_the_ranks_of_the_quickstart_come_to_hold(quickstart: Path) -> None:
    planned = json.loads((quickstart / "plan.json").read_text())["stages"]
    for stage in planned:
        if stage["memory"] is not None:
            receipt = json.loads((quickstart / "stages" / stage["name"] / "receipt.json").read_text())
            assert stage["memory_per_rank"]["value"] == pytest.approx(receipt["metrics"]["peak_memory_bytes"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("micro", "recompute"), [(1, "none"), (8, "none"), (2, "attention"), (4, "full")])
@pytest.mark.parametrize(
    "layout", [(1, 1, 1), (1, 1, 2), (1, 1, 3), (2, 1, 1), (2, 2, 1), (2, 2, 2), (2, 1, 3), (2, 2, 3)]
)
def test_planned_tensors_are_right_in_every_layout(layout: Any, micro: int, recompute: str) -> None:
    """With the load that the bench's untrained routers meet: nearly the worst one."""
    settings, facts = case(*layout, micro, recompute, 4096)
    found = measured(settings, facts, steps=1, count_tensors=True)
    worst = imbalance(facts.router, settings.parallel.expert_parallel_size).worst
    assert found.tensor_bytes is not None
    expected = planned(settings, facts, Imbalance(1.0, worst, worst, "derived: worst")).tensors
    assert expected == pytest.approx(max(found.tensor_bytes), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [(2, 2, 1, 4, "none", 2048), (2, 2, 3, 4, "none", 2048), (1, 1, 1, 4, "none", 4096), (1, 1, 1, 8, "full", 2048)],
)
def test_planned_memory_is_what_the_kernel_counts_after_many_steps(layout: Any) -> None:
    settings, facts = case(*layout, "stages.pretrain.train.steps=42")
    found = measured(settings, facts, steps=40)
    assert planned(settings, facts).bytes == pytest.approx(max(found.peak_memory_bytes), rel=0.1)


def measured(settings: Any, facts: Facts, steps: int, **options: Any) -> MeasuredSteps:
    return measure_steps(
        settings, facts.model, facts.router, facts.vocab_size, RANK_ENVIRONMENT, "cpu", steps, **options
    )


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        # dense 3,156,736 and experts 6,291,456: N = dense + experts / 2; n = 9,448,192 / 2; all in fp32
        (1, {"weights": 4 * 6_302_464, "fp32 weights of the optimizer": 4 * 4_724_096, "moments": 8 * 4_724_096}),
        (3, {"weights": 4 * 4_724_096, "fp32 weights of the optimizer": 4 * 4_724_096, "moments": 8 * 4_724_096,
             "gradients": 4 * 4_724_096, "exchange of gradients": 4 * 9_448_192}),
    ],
)  # fmt: skip
def test_states_of_a_rank_by_hand(zero: int, expected: dict[str, float]) -> None:
    settings, facts = case(2, 2, zero, 4, "none", 2048)
    memory = planned(settings, facts)
    assert sizes(memory.states) == expected
    assert sizes(memory.heap)["copy for checkpoints"] == 12 * 4_724_096


def adapters(*more: str) -> tuple[Any, Facts]:
    """The quickstart's LoRA stage in another layout."""
    config = load_config(ROOT / "configs/quickstart.yaml", [f"stages.lora.train.{setting}" for setting in more])
    facts = model_facts(config, "lora-modern")
    assert facts is not None
    return config.stage("lora-modern").train, facts


def test_a_base_in_four_bits_by_hand() -> None:
    """4 layers of 256: attention 4 x 4 x 256^2, 8 experts of 3 x 256 x 256 in each; half of them on a rank."""
    attention, experts = 4 * 4 * 256**2, 4 * 8 * 3 * 256**2
    layout = "parallel={ranks_per_node: 2, expert_parallel_size: 2, zero_stage: 2}"
    (packed, facts), (plain, _) = adapters(layout, "base_bits=4"), adapters(layout)
    assert (facts.parameters.attention, facts.parameters.experts) == (attention, experts)
    here = attention + experts / 2
    found, full = sizes(planned(packed, facts).states), sizes(planned(plain, facts).states)
    assert found["base in four bits"] == here * (4 + 1 / 8 + 1 / 512) / 8
    assert full["weights"] - found["weights"] == 4 * here
    assert "base in four bits" not in full
    work, whole = (sizes(planned(settings, facts).passes) for settings in (packed, plain))
    for name in ("forward pass", "backward pass"):
        assert work[name] - whole[name] == 4 * 256**2  # one matrix, unpacked


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["null", "4"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_planned_tensors_of_adapters_are_those_that_real_steps_allocate(bits: str, recompute: str) -> None:
    settings, facts = adapters("parallel={ranks_per_node: 1}", f"base_bits={bits}", f"recompute={recompute}")
    found = measured(settings, facts, steps=1, count_tensors=True)
    assert found.tensor_bytes is not None
    assert planned(settings, facts).tensors == pytest.approx(max(found.tensor_bytes), rel=0.1)


def test_bf16_halves_weights_and_gradients_but_not_the_optimizer() -> None:
    settings, facts = case(2, 2, 3, 4, "none", 2048)
    low = sizes(training_memory(facts, settings, "bf16", on_cpu=False).states)
    full = sizes(planned(settings, facts).states)
    for name in ("weights", "gradients", "exchange of gradients"):
        assert low[name] == full[name] / 2
    assert low["moments"] == full["moments"]


def test_muon_keeps_one_moment_of_the_matrices_it_updates() -> None:
    settings, facts = case(2, 2, 1, 4, "none", 2048, "stages.pretrain.train.optimizer={kind: muon, lr: 3e-3}")
    matrices = 1_048_576 + 6_291_456  # attention, experts
    assert sizes(planned(settings, facts).states)["moments"] == pytest.approx(4 * (2 * 9_448_192 - matrices) / 2)


def test_a_copy_for_checkpoints_waits_on_the_host_of_an_accelerator() -> None:
    settings, facts = case(2, 2, 1, 4, "none", 2048)
    assert sizes(training_memory(facts, settings, "bf16", on_cpu=False).host) == {
        "copy for checkpoints": 12 * 4_724_096
    }
    synchronous = settings.model_copy(update={"checkpoint_async": False})
    assert not training_memory(facts, synchronous, "bf16", on_cpu=False).host


def test_activations_by_hand() -> None:
    """Per token and layer, in fp32 and units of H = Q = KV = I = 256: norms 3 + 3, queries and keys with their norms 4,
    for the kernel 3 and its output twice 2; experts 2 x (2 + 1)."""
    settings, facts = case(1, 1, 1, 4, "none", 1024)
    found = activations(facts.model, facts.router, settings, 4096, 4, 1.0, in_cache=True)
    tokens, layers, unit = 1024, 4, 4 * 256
    assert found.attention == tokens * layers * (15 * unit + 4 * 4)  # and four log-sums
    assert found.experts == tokens * layers * (6 * unit + 3 * 4 * 8)  # and the router's scores
    assert found.exchange == 0
    assert found.head == tokens * (unit + 3 * unit) + 4096 * unit
    assert found.rows == 512 * 4096 * 4 * 3
    assert found.logits == tokens * 4096 * 4 * 2


def test_recompute_keeps_less_and_computes_again_at_a_time() -> None:
    none, attention, full = (
        activations(facts.model, facts.router, settings, 4096, 4, 1.0, in_cache=True)
        for settings, facts in (case(1, 1, 1, 4, name, 1024) for name in ("none", "attention", "full"))
    )
    assert none.kept > attention.kept > full.kept
    assert none.again == 0 < attention.again < full.again
    assert full.attention == 1024 * 4 * 4 * 256
    assert full.experts == 0


def test_uneven_routing_takes_memory_for_rows_that_come_from_other_ranks() -> None:
    settings, facts = case(2, 2, 1, 8, "none", 4096)
    even, worst = planned(settings, facts, EVEN), planned(settings, facts, Imbalance(1, 2.0, 2.0, "derived: all"))
    rows = 2048 * 2 * 4  # tokens x top_k x layers
    kept = rows * 4 * (3 * 256 + 256)  # experts' products, rows as they came
    assert worst.tensors - even.tensors == kept + 2 * 2048 * 2 * 256 * 4  # and as many rows again on their way, twice


def test_an_evaluation_with_a_large_vocabulary_is_the_fullest_moment() -> None:
    settings, facts = case(1, 1, 1, 8, "full", 2048, "stages.text.tokenizer.vocab_size=60000")
    memory = planned(settings, facts)
    assert memory.fullest.name == "evaluation"
    assert memory.fullest.bytes > 2048 * 60000 * 4 * 2


def test_row_counts_are_those_that_products_are_padded_to() -> None:
    from hpc.model.products import padded

    for most in (1, 63, 64, 100, 128, 1000, 4096):
        assert row_counts(most) == len({padded(rows) for rows in range(1, most + 1)}) or most & (most - 1)
        assert abs(row_counts(most) - len({padded(rows) for rows in range(1, most + 1)})) <= 1


def test_kernels_are_added_as_experts_meet_new_row_counts() -> None:
    """The quickstart's first steps: 16 experts' batches each, 224 possible counts of at most 2,048 rows, of which 97
    had occurred after 10 steps, 184 after 50 and 210 after 150; three products for each."""
    for steps, counts in ((10, 97), (50, 184), (150, 210)):
        settings, facts = case(2, 2, 1, 4, "none", 2048, f"stages.pretrain.train.steps={steps}",
                               "stages.pretrain.train.schedule={}")  # fmt: skip
        kernels = kernel_bytes(facts.model, facts.router, settings, "fp32", 1.4) / KERNEL_BYTES
        assert (kernels - FIXED_KERNELS) / 3 == pytest.approx(counts, rel=0.06)


def test_there_are_no_kernels_to_keep_in_bf16() -> None:
    settings, facts = case(1, 1, 1, 4, "none", 1024)
    assert kernel_bytes(facts.model, facts.router, settings, "bf16", 1.0) == 0
    assert kernel_bytes(facts.model, facts.router, settings, "fp32", 1.0) > 100 * MIB


def test_the_plan_shows_every_part_of_the_memory(root: Path, launch: Any) -> None:
    text = launch("plan", "configs/quickstart.yaml", "--detail", "pretrain").stdout
    for words in ("b N", "4,724,096 = trained 9,448,192 / 2 ranks", "copy for checkpoints", "worst x 2.00", "0.57 MiB"):
        assert words in text
    refused = launch("plan", "configs/quickstart.yaml", "--detail", "merge-modern")
    assert refused.returncode == 2
    assert "there are pretrain, lora-modern, lora-python" in refused.stderr
