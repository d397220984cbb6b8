"""'From scratch in about an hour at EPCC': which model, on how many tokens, from which machine of EPCC's.

The recipe is configs/scratch-one-hour.yaml; its time and energy are the plan's, with the site's figures. The sums
around it say what an hour buys, and what the large machine without GPUs would.
"""

import math
from pathlib import Path

import hpc
from hpc.bench.claims.claim import QUOTED, Bench, Claim, Entry, Premise, Step
from hpc.bench.claims.page import figure
from hpc.bench.claims.scaling_laws import CHINCHILLA, JOINT_LAW, Law, chinchilla, joint_law
from hpc.config import Pretrain
from hpc.config.load import load_config
from hpc.plan.plan import plan

NAME = "scratch-in-an-hour"
STATEMENT = "A model is trained from scratch in about an hour at EPCC."
SITE = "archer2-gpu"
RECIPE = Path(hpc.__file__).parent.parent / "configs" / "scratch-one-hour.yaml"
HOUR_S, ABOUT_AN_HOUR_MIN = 3600.0, 75.0
PREPARE_BYTES_PER_CORE_S, BYTES_PER_TOKEN, NODE_CORES = 1.25e6, 4.4, 32
LARGE_ACTIVE = 12.9e9
ENERGY, CPU_FLOPS = "energy of training (IT, the site's power model)", "their FLOPs of an hour"
PART, SLOWER = "part of the peak that this is", "hours to train at a tenth of the peak"
MINUTES, LOSS = "minutes, text included", f"loss to expect, E = 8 ({JOINT_LAW})"

TEXT = (
    Premise("text through the tokenizer, one core", PREPARE_BYTES_PER_CORE_S, "B/s",
            "measured: quickstart's text, hpc/plan; that it scales with cores is assumed"),
    Premise("bytes per token", BYTES_PER_TOKEN, "B", "measured: quickstart's text, English"),
    Premise("cores of a node", NODE_CORES, "", "configs/sites/archer2-gpu.yaml"),
)  # fmt: skip
ARCHER2 = (
    Premise("nodes of ARCHER2", 5860, "", "https://github.com/ARCHER2-HPC/emissions-tools, read 2026-11"),
    Premise("cores of a node of ARCHER2", 128, "",
            "two AMD EPYC of 64 cores: https://github.com/rcgsheffield/sheffield_hpc, other-uk-hpc-resources.rst"),
    Premise("clock under load", 2.0e9, "Hz", "default frequency cap: https://docs.archer2.ac.uk/user-guide/energy"),
    Premise("fp32 operations per cycle and core", 32, "", "two AVX2 multiply-adds of 8 values (Zen 2)"),
    Premise("MFU on CPUs", 0.2, "", "assumed, as in configs/sites/cirrus.yaml; never tried at this scale"),
    Premise("power of a node of ARCHER2", 0.5004, "kW",
            "ARCHER2's worked example, 7.740 kWh by 64 nodes in 870 s: https://docs.archer2.ac.uk/user-guide/energy"),
)  # fmt: skip


def audit(bench: Bench) -> Claim:
    """What an hour buys at EPCC, and what the recipe makes of it."""
    machine = bench.machine(SITE)
    config = load_config(RECIPE)
    stage = config.stage("pretrain")
    assert isinstance(stage, Pretrain)
    planned = next(part for part in plan(config, machine).stages if part.name == "pretrain")
    tokens, active, flops = planned.tokens, planned.active_params, planned.flops.value
    seconds, joules = planned.time.value, planned.energy.value
    assert tokens is not None and active is not None and flops is not None  # noqa: PT018
    assert seconds is not None and joules is not None  # noqa: PT018
    rate, peak = flops / seconds, stage.train.parallel.world_size * machine.peak_flops_per_rank
    steps = [
        Step("FLOPs of the recipe", f"{tokens} x {figure(flops / tokens)}", flops, "FLOP"),
        Step("speed that the plan has for it, start included", f"{figure(flops)} / {figure(seconds)}", rate, "FLOP/s"),
        Step(PART, f"{figure(rate)} / ({stage.train.parallel.world_size} x {figure(machine.peak_flops_per_rank)})",
             rate / peak, ""),
        *_recipe(tokens, active, seconds, joules, rate / peak),
        *_an_hour(rate),
        *_archer2(),
        Step(
            "47 B parameters, 12.9 B active, 20 tokens for each of these, at the same speed",
            f"6 x {figure(LARGE_ACTIVE)} x 20 x {figure(LARGE_ACTIVE)} / {figure(rate)} / 86400",
            6 * LARGE_ACTIVE * 20 * LARGE_ACTIVE / rate / 86400,
            "days",
        ),
    ]  # fmt: skip
    values = {step.name: step.value for step in steps}
    return Claim(
        name=NAME,
        statement=STATEMENT,
        said_by=QUOTED,
        kind="on paper",
        verdict="holds if" if values[MINUTES] <= ABOUT_AN_HOUR_MIN else "does not hold here",
        because=(
            f"it is a small model: {_short(planned.total_params)} parameters, {_short(planned.active_params)} active, "
            f"on {_short(planned.tokens)} tokens takes {values[MINUTES]:.0f} minutes and "
            f"{values[ENERGY]:.2f} kWh on two nodes of four MI210. A model of 47 B parameters takes "
            f"{values[steps[-1].name]:.0f} days there; all of ARCHER2's CPU nodes in an hour do "
            f"{values[CPU_FLOPS] / (6 * 20 * LARGE_ACTIVE**2):.1%} of its FLOPs."
        ),
        depends_on=(
            f"expected_mfu = {machine.expected_mfu:g} of the site, which is assumed: the time goes with its inverse "
            f"(at 0.1, {values[SLOWER]:.1f} h; naive expert parallelism across nodes "
            "was measured at 0.015 elsewhere, KempnerForge)",
            "10 GB of text that is already on the machine, and its quality; no time in the queue",
            "two nodes, all that the platform's QoS gives to one job; its other two are other people's",
            f"what 'a model' has to be able to do: {values[LOSS]:.2f} nats a token are a perplexity of "
            f"{math.exp(values[LOSS]):.0f}, which is no assistant",
            "the scaling laws' own text and tokenizer: losses on another text are not comparable",
            "ARCHER2's sum: that a job gets all nodes, and that 5,860 of them train one model at 20 % MFU",
        ),
        premises=(
            Premise("peak of one MI210, bf16", machine.peak_flops_per_rank, "FLOP/s", machine.source),
            Premise("MFU", machine.expected_mfu, "", "assumed: configs/sites/archer2-gpu.yaml"),
            Premise("FLOPs per token of the recipe", flops / tokens, "FLOP", "6 N + 12 L H T, arXiv:2204.02311"),
            Premise("time to train, by the plan of configs/scratch-one-hour.yaml", seconds, "s", planned.time.how),
            Premise("its energy (IT), by the same plan", joules, "J", planned.energy.how),
            *TEXT,
            *ARCHER2,
            Premise("tokens per active parameter of a model of 47 B", 20, "", f"rule of {CHINCHILLA}"),
        ),
        arithmetic=tuple(steps),
    )


def _recipe(tokens: int, active: int, seconds: float, joules: float, part: float) -> list[Step]:
    """Minutes, kWh and expected loss of the recipe."""
    text = tokens * BYTES_PER_TOKEN
    prepare = text / PREPARE_BYTES_PER_CORE_S / NODE_CORES
    moe, dense = joint_law(8), chinchilla()
    return [
        Step("text of so many tokens", f"{tokens} x {BYTES_PER_TOKEN}", text, "B"),
        Step("time to prepare it on one node",
             f"{figure(text)} / {figure(PREPARE_BYTES_PER_CORE_S)} / {NODE_CORES}", prepare, "s"),
        Step(MINUTES, f"({figure(seconds)} + {figure(prepare)}) / 60", (seconds + prepare) / 60, "min"),
        Step(SLOWER, f"{figure(seconds)} x {figure(part)} / 0.1 / 3600", seconds * part / 0.1 / 3600, "h"),
        Step(ENERGY, f"{figure(joules)} / 3.6e+06", joules / 3.6e6, "kWh"),
        Step(LOSS, _loss_line(moe, active, tokens), moe.loss(active, tokens), "nats"),
        Step(f"loss of a dense model as large as its active part ({CHINCHILLA})", _loss_line(dense, active, tokens),
             dense.loss(active, tokens), "nats"),
    ]  # fmt: skip


def _an_hour(rate: float) -> list[Step]:
    """What an hour of such FLOPs buys by the laws: the recipe should be near."""
    flops = rate * HOUR_S
    dense, moe = joint_law(1).optimum(flops), joint_law(8).optimum(flops)
    return [
        Step("FLOPs of an hour at that speed", f"{figure(rate)} x {HOUR_S:g}", flops, "FLOP"),
        Step(f"best dense model ({JOINT_LAW}), its tokens from its parameters",
             f"{figure(flops)} / 6 / {figure(dense.active_params)}", dense.tokens, "tokens"),
        Step("its loss", _loss_line(joint_law(1), dense.active_params, dense.tokens), dense.loss, "nats"),
        Step("best mixture of 8 experts, its tokens from its active parameters",
             f"{figure(flops)} / 6 / {figure(moe.active_params)}", moe.tokens, "tokens"),
        Step("its loss by the same law", _loss_line(joint_law(8), moe.active_params, moe.tokens), moe.loss, "nats"),
    ]  # fmt: skip


def _archer2() -> list[Step]:
    """An hour of the CPU machine, if one job had it whole."""
    nodes, cores, clock, per_cycle, mfu, kilowatts = (premise.value for premise in ARCHER2)
    peak = nodes * cores * clock * per_cycle
    flops = peak * mfu * HOUR_S
    best = joint_law(8).optimum(flops)
    return [
        Step("fp32 peak of all of ARCHER2's CPU nodes",
             f"{nodes:g} x {cores:g} x {figure(clock)} x {per_cycle:g}", peak, "FLOP/s"),
        Step(CPU_FLOPS, f"{figure(peak)} x {mfu:g} x {HOUR_S:g}", flops, "FLOP"),
        Step("best mixture of 8 experts for these, its tokens from its active parameters",
             f"{figure(flops)} / 6 / {figure(best.active_params)}", best.tokens, "tokens"),
        Step("their energy in that hour", f"{nodes:g} x {kilowatts:g} x 1", nodes * kilowatts, "kWh"),
    ]  # fmt: skip


def _loss_line(law: Law, active: float, tokens: float) -> str:
    return (
        f"{figure(law.m)} x {figure(active)}^{figure(law.mu)} + {figure(law.n)} x {figure(tokens)}^{figure(law.nu)} "
        f"+ {figure(law.c)}"
    )


def _short(value: float | None) -> str:
    assert value is not None
    return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.0f} M"


ENTRY = Entry(NAME, STATEMENT, "on paper", audit)
