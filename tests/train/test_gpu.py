"""Training on an accelerator: nccl, bf16, kernels. Skipped, and reported so, where there is none."""

from pathlib import Path
from typing import Any

import pytest

from tests.chain.conftest import SMALL
from tests.conftest import Launch
from tests.train.test_exactness import launch as train

CASE = "1/1/clip/1/qwen3_moe/adam/aux"


@pytest.fixture(autouse=True)
def _accelerator() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator: no CUDA or ROCm device here")


def on_gpu(folder: Path, *cases: str) -> dict[str, dict[str, Any]]:
    return train(1, folder, list(cases), "--device", "cuda")


@pytest.mark.gpu
def test_the_small_chain_trains_on_one_gpu(tmp_path: Path, launch: Launch) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(
        SMALL.replace("ranks_per_node: 2, expert_parallel_size: 2", "ranks_per_node: 1, expert_parallel_size: 1")
    )
    result = launch("run", config, "--set", f"run_root={tmp_path}")
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_fp32_follows_the_curve_of_the_cpu_and_bf16_stays_near_it(zero: int, tmp_path: Path) -> None:
    case = CASE.replace("1/1/clip", f"1/{zero}/clip")
    cpu = train(1, tmp_path, [CASE])[CASE]["losses"]
    gpu = on_gpu(tmp_path, f"{case}/precision=fp32", f"{case}/precision=bf16")
    assert gpu[f"{case}/precision=fp32"]["losses"] == pytest.approx(cpu, abs=1e-3)
    assert gpu[f"{case}/precision=bf16"]["losses"] == pytest.approx(cpu, abs=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "deepseek_v3"])
def test_other_architectures_and_muon_train_in_bf16(architecture: str, tmp_path: Path) -> None:
    cases = [f"1/1/free/1/{architecture}/{optimizer}/aux/precision=bf16" for optimizer in ("adam", "muon")]
    for found in on_gpu(tmp_path, *cases).values():
        assert found["losses"][-1] < found["losses"][0] - 0.2


@pytest.mark.gpu
def test_recomputation_takes_less_memory_for_the_same_curve(tmp_path: Path) -> None:
    """One process each: the peak is that of the process."""
    kept, again = (on_gpu(tmp_path, f"{CASE}/recompute={how}")[f"{CASE}/recompute={how}"] for how in ("none", "full"))
    assert again["losses"] == pytest.approx(kept["losses"], abs=1e-3)
    assert again["peak_bytes"] < kept["peak_bytes"]


@pytest.mark.gpu
def test_compiled_attention_blocks_follow_the_curve(tmp_path: Path) -> None:
    plain, compiled = f"{CASE}/precision=bf16", f"{CASE}/precision=bf16/compile=true"
    found = on_gpu(tmp_path, plain, compiled)
    assert found[compiled]["losses"] == pytest.approx(found[plain]["losses"], abs=0.05)


@pytest.mark.gpu
def test_shared_experts_beside_the_exchange_follow_the_curve_of_the_cpu(tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two accelerators: nccl takes one rank on each")
    case = "2/1/clip/1/deepseek_v3/adam/aux/precision=fp32"
    cpu, gpu = (train(2, tmp_path, [case], "--device", device)[case] for device in ("cpu", "cuda"))
    assert gpu["losses"] == pytest.approx(cpu["losses"], abs=1e-3)


@pytest.mark.gpu
def test_flash_attention_serves_packed_documents(tmp_path: Path) -> None:
    pytest.importorskip("flash_attn", reason="needs the flash-attn package, built for this torch")
    sdpa, flash = (f"{CASE}/precision=bf16/attention_kernel={kernel}" for kernel in ("sdpa", "flash_attention_2"))
    found = on_gpu(tmp_path, sdpa, flash)
    assert found[flash]["losses"] == pytest.approx(found[sdpa]["losses"], abs=0.05)
