"""What a quantize stage is planned to take, by hand."""

import pytest

from hpc.config import Quantize
from hpc.config.load import load_config
from hpc.plan.facts import Facts, model_facts
from hpc.plan.quantizing import LIBRARY_BYTES, quantize_memory, signround_flops
from tests.conftest import ROOT

PROCESS = 365 * 2**20


def planned(*settings: str) -> tuple[Quantize, Facts]:
    config = load_config(
        ROOT / "configs/quickstart.yaml",
        ["stages.quantize.needs=[merge-modern, text]", *(f"stages.quantize.{setting}" for setting in settings)],
    )
    stage, facts = config.stage("quantize"), model_facts(config, "quantize")
    assert isinstance(stage, Quantize)
    assert facts is not None
    return stage, facts


def test_rounding_holds_packed_matrices_and_reading_back_two_models() -> None:
    stage, facts = planned()
    quantizing, back = quantize_memory(facts, stage, 1)
    outside, total = 2 * 4096 * 256, facts.parameters.total
    packed = (total - outside) * 4 / 8
    assert quantizing.bytes == pytest.approx(
        PROCESS + LIBRARY_BYTES + packed + 4 * outside + 16 * (total - outside) / 4
    )
    assert back.bytes == pytest.approx(PROCESS + 8 * total + 16 * 4096 * 512)


def test_signround_holds_one_layer_and_its_calibration_text_and_takes_time_for_each_step() -> None:
    stage, facts = planned("method=auto_round", "calibration={tokens: 1024, max_tokens: 2048, iterations: 10}")
    nearest = planned()[0]
    layer = (facts.parameters.total - 2 * 4096 * 256) / 4
    more = quantize_memory(facts, stage, 1)[0].bytes - quantize_memory(facts, nearest, 1)[0].bytes
    assert more == pytest.approx((28 - 16) * layer + 3 * 4 * 256 * 2048)
    active = facts.parameters.active_matrices - 4096 * 256
    assert signround_flops(facts, stage) == pytest.approx(active * 6 * (10 * 8 * 256 + 1024))
    assert signround_flops(facts, nearest) == 0
