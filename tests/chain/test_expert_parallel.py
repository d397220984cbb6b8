"""Expert parallelism changes where experts are, not what is learned, through the whole chain; the matrix of layouts is
in tests/train/test_exactness.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chain.conftest import SMALL
from tests.conftest import Launch

# A small learning rate: at a large one, rounding of 1e-7 tips a token to another expert by step 30, and the two curves
# part like any two runs whose sums are added in another order.
GENTLE = SMALL.replace("lr: 3e-3", "lr: 5e-4")
ALONE = GENTLE.replace("ranks_per_node: 2, expert_parallel_size: 2", "ranks_per_node: 1, expert_parallel_size: 1")
# One micro-batch a step on both sides: the balancing loss is not linear, so its counts must span the same tokens.
ALONE = ALONE.replace("micro_batch_size: 4", "micro_batch_size: 8")


def train(folder: Path, config: str, launch: Launch) -> list[dict[str, Any]]:
    folder.mkdir()
    (folder / "small.yaml").write_text(config)
    result = launch("run", folder / "small.yaml", "--set", f"run_root={folder}", "--set", "tracking.wandb=disabled")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (folder / "small/stages/pretrain/metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] and "lr" in row]


@pytest.mark.slow
def test_two_ranks_with_experts_apart_follow_the_curve_of_one_rank(tmp_path: Path, launch: Launch) -> None:
    two, one = train(tmp_path / "two", GENTLE, launch), train(tmp_path / "one", ALONE, launch)
    assert len(one) == len(two) == 50
    assert one[0]["loss"] - one[-1]["loss"] > 0.4, "both must have learned something to compare"
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)) < 1e-4
    # Adam hides a wrong scale of the experts' gradients from the loss; their norm does not.
    assert [row["grad_norm"] for row in two[:10]] == pytest.approx([row["grad_norm"] for row in one[:10]], rel=1e-4)
    assert [row["router_load"] for row in two[:10]] == [row["router_load"] for row in one[:10]]
