"""Bytes of each kind of parallelism against figures worked out by hand."""

import pytest

from hpc.plan.traffic import (
    context_parallel_bytes,
    copies,
    data_parallel_bytes,
    expert_parallel_bytes,
    leaves_domain,
    pipeline_bytes,
    ring_seconds,
    seconds,
    share,
    tensor_parallel_bytes,
)


def test_expert_parallel_sends_every_token_to_its_experts_and_back_forward_and_backward() -> None:
    # 4096 tokens x 8 experts x 7168 values = 234,881,024; forward and backward; 1 + 2 bytes; 63 of 64 ranks are others
    assert expert_parallel_bytes(4096, 7168, 8, 64, dispatch_item=1) == 234_881_024 * 2 * 3 * 63 / 64
    assert expert_parallel_bytes(4096, 7168, 8, 1) == 0


@pytest.mark.parametrize(
    ("top_k", "places", "expected"),
    [(1, 8, 1), (8, 1, 1), (2, 2, 1.5), (2, 4, 1.75), (3, 2, 1.75)],  # 2 of 4: 1 if both coincide (1/4), else 2
)
def test_a_token_goes_once_to_a_place_that_has_several_of_its_experts(top_k: int, places: int, expected: float) -> None:
    assert copies(top_k, places) == pytest.approx(expected)


def test_tensor_parallel_is_four_all_reduces_of_the_activations() -> None:
    # 8192 x 8192 values x 2 bytes = 134,217,728; an all-reduce sends it twice over, less the own eighth; four of them
    assert tensor_parallel_bytes(8192, 8192, 8) == 134_217_728 * 2 * 4 * 7 / 8
    assert tensor_parallel_bytes(8192, 8192, 1) == 0


def test_context_parallel_passes_keys_and_values_round_the_ring_and_their_gradients_back() -> None:
    # 1024 tokens x 2048 values x 2 bytes, three neighbours, once forward and twice backward
    assert context_parallel_bytes(1024, 2048, 4) == 1024 * 2048 * 2 * 3 * 3


def test_a_pipeline_stage_sends_activations_and_gradients_for_each_virtual_stage() -> None:
    assert pipeline_bytes(4096, 8192, 5) == 4096 * 8192 * 2 * 2 * 5


@pytest.mark.parametrize(
    ("stage", "per_step", "per_micro_batch"),
    [(0, 2 * 4 * 8e9, 0), (1, (4 + 2) * 8e9, 0), (2, (4 + 2) * 8e9, 0), (3, 0, (2 + 2 + 4) * 8e9)],
)
def test_zero_stages_send_what_their_paper_says(stage: int, per_step: float, per_micro_batch: float) -> None:
    sent = data_parallel_bytes(8e9, 64, stage)
    assert sent.per_step == pytest.approx(per_step * 63 / 64)
    assert sent.per_micro_batch == pytest.approx(per_micro_batch * 63 / 64)


def test_an_expert_group_of_64_stays_inside_a_rack_of_72_and_leaves_a_node_of_8() -> None:
    assert leaves_domain(64, 72) == 0
    assert leaves_domain(64, 8) == 56 / 63
    assert leaves_domain(8, 8, neighbours=4) == 6 / 7  # two of the eight on a node whose places others share


def test_an_all_to_all_takes_as_long_as_its_slower_part() -> None:
    assert seconds(63e9, 64, 8, 450e9, 50e9) == pytest.approx(56e9 / 50e9)
    assert seconds(63e9, 64, 72, 900e9, 50e9) == pytest.approx(0.07)


def test_a_ring_over_two_nodes_crosses_with_an_eighth_of_the_buffer_on_each_port() -> None:
    inside, between = 16e9 * 7 / 8 / 450e9, 16e9 / 8 / 2 / 50e9
    assert ring_seconds(16e9 * share(16), 16, 8, 450e9, 50e9) == pytest.approx(inside + between)
    assert ring_seconds(0.0, 1, 8, 450e9, 50e9) == 0
