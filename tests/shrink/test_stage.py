"""The quantize stage with everything that looks at text: budget of bits, router passport, SignRound."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc.config import Facility, Prepare, Quantize, Reuse, Tracking
from hpc.data.store import write_store
from hpc.errors import ConfigError
from hpc.run.directory import StageDirectory
from hpc.run.task import Context, Result, TaskFile, World, read_progress
from hpc.stages import quantize
from tests.data.preparation import MACHINE
from tests.shrink.small import VOCABULARY, model_on_disk


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Run directory with a model and a text."""
    artifact = tmp_path / "stages/text/artifact"
    artifact.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for part, tokens in (("train", 2000), ("held_out", 1000)):
        write_store(artifact / part, [draw.integers(0, 94, tokens)], VOCABULARY)
    (artifact / "tokens.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    model_on_disk(tmp_path / "stages/model/artifact")
    (tmp_path / "stages/small").mkdir()
    return tmp_path


def context_of(run: Path, **settings: Any) -> Context:
    stages = [
        Reuse.model_validate({"kind": "reuse", "name": "model", "init": {"from": "somewhere"}}),
        Prepare.model_validate({"kind": "prepare", "name": "text", "sources": [{"files": ["a.txt"]}]}),
        Quantize.model_validate(
            {"kind": "quantize", "name": "small", "needs": ["model", "text"], "group_size": 32, **settings}
        ),
    ]
    task = TaskFile(
        run="run", run_directory=str(run), stage=stages[2], stages=stages, inputs={}, seed=0, tracking=Tracking(),
        machine=MACHINE, facility=Facility(), ranks=1, nodes=1,
    )  # fmt: skip
    return Context(task, StageDirectory(run / "stages/small"), World(), attempt=1)


def test_a_budget_is_kept_and_experts_that_saw_little_text_are_named_and_rounded_to_nearest(chain: Path) -> None:
    calibration = {"tokens": 256, "seq_len": 32, "iterations": 2, "batch_size": 4, "min_expert_tokens": 100}
    context = context_of(chain, method="auto_round", bits_per_weight=4.8, calibration=calibration)
    found: Result = quantize.run(context)
    metrics, census = found.metrics, found.census
    assert metrics.keys() == found.provenance.keys()
    assert 4.0 < metrics["matrix_bits_per_weight"] <= 4.8
    assert census["bits"].keys() == {"experts", *(f"model.layers.{layer}.self_attn" for layer in range(2))}
    assert len({unit["bits"] for unit in census["bits"].values()}) > 1
    seen = census["calibration"]["assignments"]
    assert metrics["calibration_tokens"] == 1024
    assert [sum(layer) for layer in seen] == [1024, 1024]
    assert seen[1][3] == 0
    assert metrics["min_expert_tokens"] == 0
    short = [count for layer in seen for count in layer if count < 100]
    assert metrics["experts_under_minimum"] == len(short) >= 1
    assert {"layer": 1, "expert": 3, "tokens": 0} in census["calibration"]["short"]
    assert read_progress(context.directory)["text"] == "reading back"
    assert not [path for path in context.directory.root.iterdir() if path.name.startswith(".")]


def test_zero_points_of_experts_and_windows_beyond_the_context_are_refused_before_anything_is_done(chain: Path) -> None:
    with pytest.raises(ConfigError, match="'model' has experts, and transformers reads no zero points of theirs"):
        quantize.run(context_of(chain, symmetric=False))
    with pytest.raises(ConfigError, match=r"calibration\.seq_len 128 is longer than the context of the model, 64"):
        quantize.run(context_of(chain, method="auto_round", calibration={"seq_len": 128, "iterations": 1}))
