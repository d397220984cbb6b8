"""What a rank may hold while a model is loaded: the limit, and (slow) that every layout keeps to it."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from hpc.bench.reuse import CONSTANT_GIB, LAYOUTS, TOLERANCE, limit_bytes
from tests.conftest import ROOT


def test_the_limit_is_a_share_of_the_experts_and_the_rest() -> None:
    by_name = {layout.name: layout for layout in LAYOUTS}
    wanted = {
        "adapters, EP 1": 120, "adapters, EP 2": 70, "adapters, EP 2 + ZeRO-3": 60, "adapters, ZeRO-3": 60,
        "all weights, EP 1": 120 + 180 + 120, "all weights, EP 2": 70 + 180 + 20,
        "all weights, EP 2 + ZeRO-3": 60 + 180 + 60, "all weights, ZeRO-3": 60 + 180 + 60,
    }  # fmt: skip
    found = {name: limit_bytes(experts=100, rest=20, tensor=7, layout=layout) for name, layout in by_name.items()}
    assert found == {name: 4 * elements + 7 for name, elements in wanted.items()}


@pytest.mark.slow
def test_no_rank_holds_more_than_its_share_while_a_model_is_loaded() -> None:
    command = [sys.executable, str(ROOT / "launch.py"), "bench", "reuse", "--rounds", "2", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    whole = found["experts_gib"] + found["rest_gib"]
    assert len(found["layouts"]) == len(LAYOUTS)
    for row in found["layouts"]:
        assert row["checked"] > 10_000
        assert max(row["peak_gib"]) <= row["limit_gib"] * TOLERANCE + CONSTANT_GIB, row
        if row["layout"].startswith("adapters") and row["layout"] != "adapters, EP 1":
            assert max(row["peak_gib"]) < 0.7 * whole, row
    assert found["one_process"]["ranges"]["peak_gib"] < found["one_process"]["transformers"]["peak_gib"]
