"""auto-round in a process of its own, for real: what it leaves is loaded by transformers and set beside its source."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from hpc.errors import ArtifactError
from hpc.model.build import load_model
from hpc.shrink.compressed import packed_census, quantized_bits
from hpc.shrink.library import quantize_apart
from hpc.shrink.request import Request
from hpc.shrink.sensitivity import rounded
from tests.conftest import ROOT
from tests.shrink.small import SHAPES, model_on_disk

EXPERT = "model.layers.1.mlp.experts"


def request(folder: Path, **changes: Any) -> Request:
    """SignRound in two steps, 4 bits."""
    ids = folder / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 94, (8, 32)))
    usual = Request(
        source=str(folder / "source"), target=str(folder / "target"), scratch=str(folder / "scratch"), format="int",
        bits=4, group_size=32, symmetric=True, ids=str(ids), iterations=2, batch_size=4,
    )  # fmt: skip
    return replace(usual, **changes)


def error(folder: Path, expert: int) -> tuple[float, float]:
    """Of an expert's gate matrix in 4 bits, read back: from its source, and from that rounded to nearest; relative."""
    places = (load_model(folder / place).get_submodule(EXPERT) for place in ("source", "target"))
    source, found = (experts.gate_up_proj[expert, :64].detach() for experts in places)
    return relative(found, source), relative(found, rounded(source, 4, 32, symmetric=True))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def test_a_process_killed_with_its_parent_leaves_nothing_and_the_next_one_is_complete(tmp_path: Path) -> None:
    model_on_disk(tmp_path / "source")
    wanted = request(tmp_path, bits_of={"model.layers.1.self_attn.q_proj": 6})
    (tmp_path / "request.json").write_text(json.dumps(asdict(wanted)))
    code = (
        "import json\nfrom pathlib import Path\nfrom hpc.shrink.library import quantize_apart\n"
        "from hpc.shrink.request import Request\n"
        f"quantize_apart(Request(**json.loads(Path({str(tmp_path / 'request.json')!r}).read_text())), print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until = time.monotonic() + 60
    while not (children := psutil.Process(parent.pid).children()) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    psutil.wait_procs(children, timeout=30)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert (tmp_path / "scratch/request.json").exists()
    assert not (tmp_path / "target").exists()

    told: list[tuple[float, float]] = []
    peak = quantize_apart(wanted, lambda done, total: told.append((done, total)))
    assert 2e8 < peak < 2e9
    assert told[0] == (0, 2)
    assert not (tmp_path / "scratch").exists()
    assert packed_census(tmp_path / "target")["experts"]["packed_tensors"] == 2 * 4 * 3
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32) + 8 * 3 * 64 * 64
    assert quantized_bits(tmp_path / "target") == pytest.approx(4.5 + 2 * 64 * 64 / weights, rel=0.01)
    assert 0.05 < error(tmp_path, 0)[0] < 0.15
    first, second = (load_model(tmp_path / place) for place in ("source", "target"))
    second(input_ids=torch.zeros(1, 2, dtype=torch.long))  # dense matrices are unpacked when they are first used
    source, target = (model.model.layers[1].self_attn for model in (first, second))
    assert 0.05 < relative(target.k_proj.weight, source.k_proj.weight) < 0.15
    assert 0.01 < relative(target.q_proj.weight, source.q_proj.weight) < 0.04


@pytest.mark.slow
def test_signround_moves_what_it_may_and_leaves_the_named_experts_at_the_nearest_step(tmp_path: Path) -> None:
    model_on_disk(tmp_path / "source")
    parts = ("gate", "up", "down")
    quantize_apart(request(tmp_path, iterations=20, nearest=[f"{EXPERT}.0.{part}_proj" for part in parts]), print)
    assert error(tmp_path, 0)[1] < 1e-3
    assert error(tmp_path, 1)[1] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(SHAPES))
@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"bits": 2, "ids": None}, 0.8), ({"bits": 3, "ids": None}, 0.3), ({"bits": 5, "ids": None}, 0.07),
        ({"bits": 6, "ids": None}, 0.035), ({"bits": 8, "ids": None}, 0.01),
        ({"format": "fp8", "bits": 8, "ids": None}, 0.05), ({"bits": 4}, 0.15),
        ({"bits": 4, "ids": None, "bits_of": {"model.layers.0.self_attn.k_proj": 8}}, 0.15),
    ],
    ids=["2", "3", "5", "6", "8", "fp8", "signround", "mixed"],
)  # fmt: skip
def test_every_format_is_read_back_by_transformers(
    tmp_path: Path, architecture: str, changes: dict[str, Any], limit: float
) -> None:
    model_on_disk(tmp_path / "source", architecture)
    quantize_apart(request(tmp_path, **changes), print)
    assert packed_census(tmp_path / "target")["experts"]["packed_tensors"] == 2 * 4 * 3
    assert 0.001 < error(tmp_path, 0)[0] < limit


@pytest.mark.slow
def test_what_the_library_says_last_is_told_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"auto-round ended with code 1 and left no model: \S"):
        quantize_apart(request(tmp_path, ids=None), print)
