"""The door to MegaBlocks, as far as it goes without MegaBlocks: what it refuses. Its numbers: tests/megablocks."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from hpc.errors import ConfigError
from hpc.model.experts import loop
from hpc.model.megablocks import REVISION, grouped_gemm, megablocks


@pytest.mark.parametrize("revision", ["main", "v1", "ABCDEF" * 7, ""])
def test_a_revision_that_can_move_is_refused(revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REVISION, revision)
    with pytest.raises(ConfigError, match="is not a commit") as refused:
        grouped_gemm()
    assert "kernels==" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_precisions_than_bf16_are_refused_before_the_kernel_is_asked_for() -> None:
    with FakeTensorMode():  # the only way to a CUDA tensor where there is no CUDA
        x, weight = torch.empty(6, 4, device="cuda"), torch.empty(2, 3, 4, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"bf16 only, not torch\.float32 with torch\.bfloat16"):
        megablocks(x, weight, torch.tensor([2, 4]))


def test_an_expert_with_more_elements_than_int32_counts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(x: Tensor, weight: Tensor, counts: Tensor, trans_b: bool) -> Tensor:
        assert trans_b
        return x.new_empty(int(counts.sum()), weight.shape[1])

    monkeypatch.setattr("hpc.model.megablocks.grouped_gemm", lambda: kernel)
    weight = torch.empty(2, 1024, 4096, device="meta")
    most = 2**31 // 4096
    with pytest.raises(ConfigError, match="one expert got 524,288 rows of 4,096"):
        megablocks(torch.empty(most + 5, 4096, device="meta"), weight, torch.tensor([most, 5]))
    y = megablocks(torch.empty(most + 7, 4096, device="meta"), weight, torch.tensor([most - 1, 5]))
    assert y.shape == (most + 7, 1024)


@pytest.mark.gpu
def test_on_a_gpu_the_real_kernel_is_the_loop_forward_and_backward() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator: no CUDA device here")
    try:
        grouped_gemm()
    except ConfigError as absent:
        pytest.skip(str(absent))
    torch.manual_seed(0)
    counts = torch.tensor([300, 0, 41, 171], device="cuda")
    x = torch.randn(520, 256, device="cuda", dtype=torch.bfloat16)  # eight rows of padding
    weight = 0.1 * torch.randn(4, 384, 256, device="cuda", dtype=torch.bfloat16)
    slope = torch.randn(512, 384, device="cuda", dtype=torch.bfloat16)
    found = []
    for backend in (megablocks, loop):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = backend(*inputs, counts)[:512]
        found.append([y.detach(), *torch.autograd.grad((y * slope).sum(), inputs)])
    for ours, reference in zip(*found, strict=True):
        assert (ours - reference).abs().max() < 0.02 * reference.abs().max()
