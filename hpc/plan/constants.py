"""Constants of the step-time model: what is not on a data sheet, with where each prior comes from.

They are fitted on the rows of published.csv (`launch.py bench plan --fit` writes step_time.json), all at once, towards
the priors; none belongs to a run, a model or a source.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

FITTED = Path(__file__).parent / "step_time.json"


@dataclass(frozen=True)
class Constants:
    """What is not on a data sheet. Every value is positive; the default is the prior of the fit, with its source."""

    gemm_volta: float = 0.75
    gemm_ampere: float = 0.87
    """Measured: 271 of 312 TFLOP/s (stas00/ml-engineering @ b9e2972), as for the next ones."""
    gemm_hopper: float = 0.80
    gemm_blackwell: float = 0.78
    """Assumed between Hopper's bf16 and fp8."""
    gemm_cdna2: float = 0.60
    """Assumed as CDNA 3."""
    gemm_cdna3: float = 0.55
    """Measured: 0.51 (MI300X), 0.60 (MI325X)."""
    gemm_cdna4: float = 0.60
    fp8_hopper: float = 0.71
    """Measured, as gemm_ampere."""
    fp8_blackwell: float = 0.78
    fp8_cdna: float = 0.50
    fp4_blackwell: float = 0.65
    """Assumed; some layers of an fp4 recipe stay in fp8 or bf16."""
    operand_bytes: float = 1.0
    """Traffic of a product's operands that is not hidden behind it, in passes over them, for short weights."""
    row_bytes: float = 1.0
    """The same for few rows."""
    grouped: float = 0.9
    """Rate of the experts' grouped products over that of one product; assumed."""
    attention: float = 0.65
    """Part of the bf16 peak for scores and values (FlashAttention 2 and 3: 0.5 to 0.75)."""
    attention_flash2: float = 0.35
    """The same on Hopper for FlashAttention 2: 35 % (pytorch.org/blog/flashattention-3)."""
    exponentials: float = 1.0
    """Passes of exp() over the scores, forward and backward, that are not hidden."""
    element_bytes: float = 1.0
    """Passes of norms, residuals and activations over memory, of those that the code below counts."""
    eager_bytes: float = 1.5
    """That many times more of them with PyTorch's own kernels."""
    moe_bytes: float = 1.5
    """The same for routed tokens: permutation, activation, weighting."""
    cast_bytes: float = 1.0
    """The same for quantization to fp8."""
    cast_scales: float = 1.3
    """More of that when scales are fine (blocks, mx, nvfp4)."""
    layer_us: float = 600.0
    """Host time to start one dense or attention layer's kernels, forward and backward, microseconds. It shows where the
    accelerator is done sooner."""
    moe_us: float = 5000.0
    """The same for an MoE layer: routing, permutation, a wait for sizes."""
    rack_host: float = 0.6
    """Host time in NVL72 racks over that elsewhere: runs there use CUDA graphs for a part of a layer (Megatron-Bridge,
    moe-hardware-configs). How much it saves is assumed."""
    expert_us: float = 20.0
    """The same for one more local expert."""
    tensor_exposed: float = 0.6
    """Part of the tensor-parallel collectives' time that is not hidden, at the links' data-sheet bandwidth."""
    context_exposed: float = 0.5
    expert_exposed: float = 1.2
    """All-to-all inside the fast domain; above 1: slower than the data sheet, and not hidden."""
    expert_network: float = 1.2
    """All-to-all over the network."""
    data_exposed: float = 1.3
    """Data-parallel collectives: time over that at data-sheet bandwidth, before hiding."""
    pipeline_exposed: float = 0.3
    bubble: float = 1.0
    """Of the bubble of interleaved 1F1B."""
    selective: float = 0.25
    """What selective recomputation repeats of a forward pass."""
    mamba_bytes: float = 4.0
    """Passes over memory of a state-space layer's scan, and its small products as if they were passes."""
    doubling: float = 0.005
    """Slow-down for each doubling of the ranks beyond eight: stragglers, longer rings."""

    def gemm(self, family: str, form: str) -> float:
        """Part of the peak that a large product reaches."""
        base = getattr(self, f"gemm_{family}", self.gemm_hopper)
        if form == "bf16":
            return float(base)
        vendor = "cdna" if family.startswith("cdna") else family
        eight = getattr(self, f"fp8_{vendor}", self.fp8_hopper)
        return float(eight if form == "fp8" else self.fp4_blackwell)


@cache
def fitted() -> dict[str, Any]:
    """step_time.json: constants fitted on all published rows, and without each source and hardware."""
    found: dict[str, Any] = json.loads(FITTED.read_text(encoding="utf-8"))
    return found


@cache
def _best() -> Constants:
    return replace(Constants(), **fitted()["all"])


def constants(values: Mapping[str, float] | None = None) -> Constants:
    """The fitted constants, or those of a mapping."""
    return _best() if values is None else replace(Constants(), **values)


def keep(found: Mapping[str, Any]) -> None:
    """Write step_time.json, and forget what was read from it before."""
    FITTED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    fitted.cache_clear()
    _best.cache_clear()


def names() -> tuple[str, ...]:
    """Names of the constants."""
    return tuple(field.name for field in fields(Constants))


def as_dict(c: Constants) -> dict[str, float]:
    """Names and values, as step_time.json holds them."""
    return asdict(c)
