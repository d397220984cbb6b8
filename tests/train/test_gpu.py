"""The same chain on an accelerator: nccl, bf16. Skipped, and reported so, where there is none."""

from pathlib import Path

import pytest

from tests.chain.conftest import SMALL
from tests.conftest import Launch


@pytest.mark.gpu
def test_the_small_chain_trains_on_one_gpu(tmp_path: Path, launch: Launch) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator: no CUDA or ROCm device here")
    config = tmp_path / "small.yaml"
    config.write_text(
        SMALL.replace("ranks_per_node: 2, expert_parallel_size: 2", "ranks_per_node: 1, expert_parallel_size: 1")
    )
    result = launch("run", config, "--set", f"run_root={tmp_path}")
    assert result.returncode == 0, result.stderr
