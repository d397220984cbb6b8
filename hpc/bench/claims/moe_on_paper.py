"""What a mixture of experts saves at sizes that cannot be trained here: a scaling law's answer, and published runs'."""

from hpc.bench.claims.claim import QUOTED, Premise, Step
from hpc.bench.claims.page import figure
from hpc.bench.claims.scaling_laws import Law, Optimum, joint_law

CLAIMED = Premise("energy saved, as told", 0.65, "", QUOTED)
RELATIVE_MFU = Premise("speed of a mixture of experts, FLOP for FLOP, of a dense model's", 0.8, "",
                       "assumed: exchange between ranks, uneven experts, smaller products")  # fmt: skip
PUBLISHED = (
    Premise("speed-up of OLMoE-1B-7B over the dense model of its active size, wall clock", 2, "",
            "its authors: https://contextual.ai/olmoe-mixture-of-experts; arXiv:2409.02060, section 4.1"),
    Premise("speed-up of Switch-Base over T5-Base", 7, "", "arXiv:2101.03961, abstract: up to"),
    Premise("speed-up of the largest Switch models over T5-XXL", 4, "", "arXiv:2101.03961, abstract"),
    Premise("speed-up of Ling-mini-beta over a dense 6.1 B, in FLOPs", 7, "", "arXiv:2507.17702, abstract"),
    Premise("speed-up of DeepSeekMoE 16B over DeepSeek 7B, in FLOPs (40.5 % of the computations)", 1 / 0.405, "",
            "https://github.com/deepseek-ai/DeepSeek-MoE, README"),
)  # fmt: skip
CASES = ((8, 1e20), (32, 1e20), (8, 1e22), (32, 1e22))
"""Experts and FLOPs of the dense model. Top-1; each expert as wide as the dense layer."""


def premises() -> tuple[Premise, ...]:
    """What the arithmetic starts from."""
    return (CLAIMED, RELATIVE_MFU, *PUBLISHED)


def arithmetic() -> tuple[Step, ...]:
    """Speed-up that the claim needs, savings of published runs, savings by the law."""
    claimed = CLAIMED.value
    steps = [Step("speed-up that the claim needs", f"1 / (1 - {claimed:g})", 1 / (1 - claimed), "")]
    steps += [
        Step(f"saved by a {run.name}", f"1 - 1 / {figure(run.value)}", 1 - 1 / run.value, "") for run in PUBLISHED
    ]
    for experts, flops in CASES:
        steps += _case(experts, flops)
    return tuple(steps)


def saved_flops(experts: int, flops: float) -> float:
    """Fraction of a dense model's FLOPs that the best mixture saves at the loss of the best dense model."""
    return 1 - joint_law(experts).flops_for(joint_law(1).optimum(flops).loss) / flops


def _case(experts: int, flops: float) -> list[Step]:
    dense, moe = joint_law(1), joint_law(experts)
    best = dense.optimum(flops)
    enough = moe.flops_for(best.loss)
    equal = moe.optimum(enough)
    flops_part, mfu = enough / flops, RELATIVE_MFU.value
    what = f"{experts} experts against dense at {flops:.0e} FLOPs"
    return [
        Step(f"loss of the best dense model of {flops:.0e} FLOPs", _line(dense, best), best.loss, "nats"),
        Step(f"loss of the best mixture of {experts} experts with {figure(enough)} FLOPs, the same",
             _line(moe, equal), equal.loss, "nats"),
        Step(f"FLOPs saved, {what}", f"1 - {figure(enough)} / {flops:.0e}", 1 - flops_part, ""),
        Step(f"energy saved, {what}", f"1 - {figure(flops_part)} / {mfu:g}", 1 - flops_part / mfu, ""),
    ]  # fmt: skip


def _line(law: Law, best: Optimum) -> str:
    return (
        f"{figure(law.m)} x {figure(best.active_params)}^{figure(law.mu)} + {figure(law.n)} x "
        f"{figure(best.tokens)}^{figure(law.nu)} + {figure(law.c)}"
    )
