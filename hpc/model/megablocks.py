"""The door to MegaBlocks (Gale et al. 2022, arXiv:2211.15841): its grouped GEMM, in either form it can be had.

* The Hub's build, maintained, compiled for pairs of torch and CUDA, CUDA 13 included (version 1, as transformers asks
  for). Fetched once where there is internet, which fails with the list of builds when this torch has none; `REVISION`
  names the commit, since a branch moves, and compute nodes read it from the Hub's cache offline.
* PyPI's 0.10.0 (June 2025), compiled on the spot. It pins torch 2.7, so it goes in without its dependencies. CUDA 12
  only: its cumsum.h calls CUB with an argument that CUDA 13 removed (databricks/megablocks#180).

`GET_IT` says how. Both call cuBLAS once per expert, unless built with GROUPED_GEMM_CUTLASS=1. Only the grouped GEMM
is used, because the layers around it are not safe at scale:
* `mlp_impl="sparse"` numbers block columns in int16 and computes garbage past the 255th;
* the Hub's `MegaBlocksMoeMLP` drops tokens above a capacity of 1.0 without a word;
* gather and scatter count elements in int32: wrong from tokens x top_k x hidden = 2^31 on (the grouped GEMM, built
  with CUTLASS, counts those of one expert so: refused here);
* under expert parallelism its experts divide their gradients by the ranks, which DeepSpeed does too.
"""

import os
import re
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from hpc.errors import ConfigError

GroupedGemm = Callable[..., Tensor]
"""(x_ND, weight_EOD, counts_E, trans_b=True) -> y_NO: bf16 and contiguous on a GPU, the counts int64 on the host."""

REPOSITORY = "kernels-community/megablocks"
REVISION = "GREENMOE_MEGABLOCKS_REVISION"
"""Environment variable with the commit of the Hub's build, 40 hexadecimal digits. Unset: PyPI's form is imported."""


GET_IT = (
    "take grouped_mm, or get it where there is internet: pip install kernels==0.17.2, then python -c "
    f"\"import kernels; print(kernels.install_kernel('{REPOSITORY}', version=1))\" and set {REVISION} to the commit in "
    "the printed path; or on a CUDA 12 node, TORCH_CUDA_ARCH_LIST set: pip install --no-deps --no-build-isolation "
    "megablocks==0.10.0 stanford-stk==0.7.1 grouped_gemm==0.3.0"
)
"""The way out, the end of every message here."""

INT32_ELEMENTS = 2**31


def megablocks(x_ND: Tensor, weight_EOD: Tensor, counts_E: Tensor) -> Tensor:
    """The backend: y (N, O), rows past the sum of the counts are zero. Waits for the GPU once, for the counts.

    Raises ConfigError for what the kernel cannot compute or would compute wrongly.
    """
    counts_E = counts_E.to("cpu", torch.int64)
    rows = int(counts_E.sum())
    if rows:
        _check(x_ND, weight_EOD, int(counts_E.max()))
        y_NO = grouped_gemm()(x_ND[:rows].contiguous(), weight_EOD.contiguous(), counts_E, trans_b=True)
    else:  # nothing came to this rank: CUTLASS refuses a launch without work, the weights want their zero gradient
        y_NO = x_ND[:0] @ weight_EOD[0].T
    padding = x_ND.shape[0] - rows
    return functional.pad(y_NO, (0, 0, 0, padding)) if padding else y_NO


def _check(x_ND: Tensor, weight_EOD: Tensor, largest: int) -> None:
    """Refuse what the CUDA kernel takes wrongly. A tensor on the CPU meets the test's stand-in, which takes fp32."""
    if x_ND.is_cuda and not (x_ND.dtype is weight_EOD.dtype is torch.bfloat16):
        raise ConfigError(
            f"train.precision: expert_compute = megablocks computes bf16 only, not {x_ND.dtype} with "
            f"{weight_EOD.dtype}: set train.precision to bf16 or take grouped_mm"
        )
    width = max(weight_EOD.shape[1:])
    if largest * width >= INT32_ELEMENTS:
        raise ConfigError(
            f"train.batches.micro_batch_size: one expert got {largest:,} rows of {width:,}, but megablocks counts to "
            f"2^31 elements: lower it, or take grouped_mm"
        )


@cache
def grouped_gemm() -> GroupedGemm:
    """The grouped GEMM of the form that is installed. Raises ConfigError, with the way to get one, when none is."""
    revision = os.environ.get(REVISION)
    return _from_pypi() if revision is None else _from_hub(revision)


def _from_hub(revision: str) -> GroupedGemm:
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise ConfigError(f"{REVISION} = {revision!r} is not a commit (40 hexadecimal digits): {GET_IT}")
    try:
        import kernels

        build = kernels.get_kernel(REPOSITORY, revision=revision)
        found: GroupedGemm = build.gg_ops.gmm
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{REPOSITORY} at {REVISION} = {revision} cannot be loaded ({error}): {GET_IT}") from None
    return found


def _from_pypi() -> GroupedGemm:
    try:
        from megablocks import grouped_gemm_util
    except ImportError as error:
        raise ConfigError(f"train.expert_compute = megablocks cannot be imported ({error}): {GET_IT}") from None
    if not grouped_gemm_util.grouped_gemm_is_available():
        raise ConfigError(f"train.expert_compute = megablocks lacks grouped_gemm: {GET_IT}")
    found: GroupedGemm = grouped_gemm_util.ops.gmm
    return found
