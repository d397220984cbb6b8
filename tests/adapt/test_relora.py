"""ReLoRA on real process groups: merging is exact, updates add up to a higher rank, the optimizer forgets what it
should, and nothing of it depends on the layout or on an interruption."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from tests.adapt.cycles import CYCLES, EVERY, RANK
from tests.ranks import on_ranks

REFUSED = ("1/1/magnitude/stale", "1/1/zero/others")
CASES = {
    1: ["1/1/zero", "1/1/magnitude", *REFUSED],
    2: ["1/2/magnitude", "2/1/magnitude/save", "2/1/magnitude/resume", "2/3/magnitude", "1/3/random", "2/2/random",
        "1/2/zero"],
}  # fmt: skip


def run(ranks: int, folder: Path, cases: list[str]) -> dict[str, Any]:
    out = folder.parent / f"cycles-{ranks}.json"
    return on_ranks(ranks, "tests.adapt.cycles", out, folder, *cases)


@pytest.fixture(scope="module")
def all_found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("relora") / "model"
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return {f"{ranks} ranks {case}": told for ranks in CASES for case, told in run(ranks, folder, CASES[ranks]).items()}


@pytest.fixture(scope="module")
def found(all_found: dict[str, Any]) -> dict[str, Any]:
    """Those that ran to their end."""
    return {case: told for case, told in all_found.items() if not case.endswith(REFUSED)}


def test_an_optimizer_that_remembers_after_a_restart_is_refused(all_found: dict[str, Any]) -> None:
    assert "the optimizer forgot 0." in all_found["1 ranks 1/1/magnitude/stale"]
    assert "of the adapters' moments, not 0.75" in all_found["1 ranks 1/1/magnitude/stale"]
    assert "changed moments of parameters that have no adapter" in all_found["1 ranks 1/1/zero/others"]


def test_merging_changes_no_logit_and_leaves_the_adapters_empty(found: dict[str, Any]) -> None:
    for told in found.values():
        assert max(told["jumps"]) < 1e-5
        assert told["bs"] == [0.0] * len(told["bs"])


def test_each_cycle_adds_its_rank_to_the_update(found: dict[str, Any]) -> None:
    """Three cycles of rank 2 make an update of rank 6, of attention and of one expert."""
    for case, told in found.items():
        if "resume" not in case:
            assert set(told["ranks"].values()) == {CYCLES * RANK}


def test_the_optimizer_forgets_what_was_asked(found: dict[str, Any]) -> None:
    assert found["1 ranks 1/1/zero"]["forgotten"] == [1.0] * CYCLES
    for case, told in found.items():
        if "magnitude" in case:
            assert told["forgotten"] == pytest.approx([0.75] * len(told["forgotten"]), abs=0.01)


@pytest.mark.parametrize("prune", ["magnitude", "random", "zero"])
def test_every_layout_has_the_same_curve(prune: str, found: dict[str, Any]) -> None:
    curves = [told["losses"] for case, told in found.items() if prune in case and "resume" not in case]
    assert len(curves) >= 2
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-4)


def test_a_run_that_goes_on_from_a_checkpoint_is_the_same_to_the_bit(found: dict[str, Any]) -> None:
    whole, resumed = found["2 ranks 2/1/magnitude/save"], found["2 ranks 2/1/magnitude/resume"]
    assert resumed["losses"] == whole["losses"][2 * EVERY :]
    assert resumed["exact"] == whole["exact"]
