"""`plan --search`: what fits, in which order, and why the rest does not."""

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hpc.config import Machine, RunConfig
from hpc.config.load import load_config
from hpc.errors import ConfigError
from hpc.plan.calibration import Measured
from hpc.plan.layouts import Search, search
from hpc.plan.plan import plan
from hpc.plan.quantity import GIB
from hpc.plan.show import render_search
from slurm.site import load_site
from tests.conftest import Launch

AT = "stages.pretrain.train"
LARGE = [
    f"{AT}.model={{hidden_size: 2048, num_layers: 24, num_attention_heads: 16, expert_size: 1024}}",
    f"{AT}.router={{num_experts: 64, top_k: 8}}",
    f"{AT}.batches={{seq_len: 2048, micro_batch_size: 1, tokens_per_step: 1048576}}",
    f"{AT}.parallel={{nodes: 4, ranks_per_node: 4, zero_stage: 3, expert_parallel_size: 16}}",
    "stages.text.tokenizer.vocab_size=50000",
    "stages.lora.train.batches={seq_len: 1024, micro_batch_size: 1, tokens_per_step: 4096}",
]


@pytest.fixture
def large(root: Path) -> RunConfig:
    return load_config(root / "configs/quickstart.yaml", LARGE)


@pytest.fixture
def machine() -> Machine:
    return load_site("jupiter-booster").machine.model_copy(update={"max_nodes": 16})


def found_for(config: RunConfig, machine: Machine, **options: Any) -> Search:
    return search(config, machine, Measured(), None, **options)


def test_what_is_found_fits_and_is_ranked(large: RunConfig, machine: Machine) -> None:
    found = found_for(large, machine)
    assert 100 < len(found.fitting) < found.tried
    assert all(layout.memory_bytes <= machine.memory_gib_per_rank * GIB for layout in found.fitting)
    seconds = [layout.seconds for layout in found.fitting]
    assert all(later > 0.98 * earlier for earlier, later in pairwise(seconds))


def test_the_cheapest_in_energy_is_not_the_fastest(large: RunConfig, machine: Machine) -> None:
    fastest, cheapest = found_for(large, machine).fitting[0], found_for(large, machine, by="energy").fitting[0]
    assert cheapest.energy_j < 0.9 * fastest.energy_j
    assert cheapest.seconds > fastest.seconds
    assert fastest.nodes == 16 > cheapest.nodes


def test_the_first_one_as_overrides_is_planned_as_it_was_found(root: Path, large: RunConfig, machine: Machine) -> None:
    found = found_for(large, machine)
    best = found.fitting[0]
    config = load_config(root / "configs/quickstart.yaml", [*LARGE, *best.overrides("pretrain")])
    stage = next(stage for stage in plan(config, machine).stages if stage.name == "pretrain")
    assert stage.memory_per_rank.value == best.memory_bytes
    assert stage.time.value == pytest.approx(best.seconds)
    assert stage.energy.value == pytest.approx(best.energy_j)


def test_every_group_of_layouts_that_does_not_fit_has_a_line(large: RunConfig, machine: Machine) -> None:
    small = machine.model_copy(update={"memory_gib_per_rank": 30.0, "max_nodes": 1})
    lines = found_for(large, small).refused
    whole = next(line for line in lines if line.startswith("zero 1") and ", EP 1, " in line)
    assert whole.startswith("zero 1, 2 and 3, EP 1, any micro-batch: ")
    assert whole.endswith(" GiB or more of 30")
    assert float(whole.split(": ")[1].split()[0]) > 30


def test_sizes_that_do_not_go_into_each_other_are_named(root: Path, machine: Machine) -> None:
    config = load_config(
        root / "configs/quickstart.yaml", [f"{AT}.batches={{seq_len: 256, micro_batch_size: 3, tokens_per_step: 3072}}",
                                           f"{AT}.parallel={{ranks_per_node: 4, expert_parallel_size: 4}}"],
    )  # fmt: skip
    lines = found_for(config, machine.model_copy(update={"max_nodes": 2})).refused
    assert lines == ("8 ranks: the 12 sequences of a step do not split",)


@pytest.mark.parametrize("bits", ["null", "4"])
def test_adapters_are_searched_with_expert_parallelism_and_without_zero_3_on_a_packed_base(
    root: Path, bits: str
) -> None:
    config = load_config(root / "configs/quickstart.yaml", [f"stages.lora.train.base_bits={bits}"])
    found = search(config, load_site("local").machine, Measured(), "lora")
    assert found.stage == "lora"
    assert {layout.expert_parallel_size for layout in found.fitting} == {1, 2}
    assert {layout.zero_stage for layout in found.fitting} == ({1, 2} if bits == "4" else {1, 2, 3})
    assert ("zero 3: a base in four bits is not split over ranks" in found.refused) == (bits == "4")


def test_a_stage_that_does_not_train_is_refused_with_those_that_do(root: Path) -> None:
    config = load_config(root / "configs/quickstart.yaml")
    with pytest.raises(ConfigError, match=r"--stage merge: .*those that train are pretrain, lora-modern, lora-python"):
        search(config, load_site("local").machine, Measured(), "merge")


def test_nothing_that_fits_is_said(large: RunConfig, machine: Machine) -> None:
    found = found_for(large, machine.model_copy(update={"memory_gib_per_rank": 1.0}))
    assert not found.fitting
    assert "0 of " in render_search(found)
    assert "not among them:" in render_search(found)


def test_the_verb_prints_words_to_paste_and_json(root: Path, launch: Launch) -> None:
    text = launch("plan", "configs/quickstart.yaml", "--search").stdout
    words = shlex.split(next(line for line in text.splitlines() if line.strip().startswith("--set")))
    again = launch("plan", "configs/quickstart.yaml", *words, "--json")
    content = json.loads(launch("plan", "configs/quickstart.yaml", "--search", "--by", "energy", "--json").stdout)
    stage = next(stage for stage in json.loads(again.stdout)["stages"] if stage["name"] == "pretrain")
    assert stage["zero_stage"] == 1
    assert content["by"] == "energy"
    assert content["best"][0] == "stages.pretrain.train.parallel.nodes=1"
    assert content["fitting"][0]["memory_bytes"] > 0
