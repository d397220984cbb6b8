"""'ReLoRA trains as well as full rank, with less memory': both trained here from one warm start, on equal tokens.

Runs configs/claims-relora-one-cycle.yaml as a user does (`launch.py run`), several times:

    first seed    every model once at each of its RATES, for the file's steps; the rate with the lowest held-out loss is
                  taken, and that run is the measured one
    other seeds   every model at its rate

Compared are the held-out loss after the last step and the peak memory of a rank: neither depends on what else the
machine does. Speed and joules do; they are told, and judged by nobody when others worked on it too. Whichever way it
goes, it is told. Beside ReLoRA stand LoRA, and ReLoRA with a single cycle, which shows what the restarts are worth;
that each restart adds directions to the update is read off the weights (hpc/bench/rank_growth.py). The run directories
take one and a half gigabytes.
"""

import math
from dataclasses import dataclass
from statistics import mean

from hpc.bench.claims.claim import Bench, Claim, Entry, Measured, Premise, Step, Verdict
from hpc.bench.claims.trained import CONFIGS, Load, Trained, launch, trained
from hpc.config.load import load_config
from hpc.plan.plan import plan
from hpc.run.directory import RunDirectory
from hpc.tracking.metrics import history

NAME = "relora-against-full-rank"
STATEMENT = "ReLoRA trains as well as full rank, with less memory."
SAID_BY = (
    "ReLoRA, arXiv:2307.05695, abstract: transformers of up to 1.3 B parameters perform comparably to regular "
    "training, with up to 5.5 GB less memory a GPU and 9 to 40 % more speed"
)
RUN, FILE, QUICK_FILE = "claims-relora", "claims-relora-one-cycle.yaml", "claims-relora.yaml"
START, FULL, RELORA = "warm-start", "full-rank", "relora"
WHAT = {RELORA: "ReLoRA", "one-cycle": "ReLoRA without restarts", "lora": "LoRA"}
RATES = {FULL: (3e-3, 1.5e-3), RELORA: (3e-3, 6e-3), "one-cycle": (3e-3, 6e-3), "lora": (3e-3, 6e-3)}
"""Adapters learn at up to twice the rate of full rank: the rule of the reference code, Guitaricet/relora."""
SEEDS = (1, 2)
QUICK_STEPS, QUICK_CYCLE = 20, 10
CYCLE_KEYS = ("schedule.restart_every_steps", "checkpoint_every_steps", "keep_every_steps")
"""Of a relora stage whose model is looked at after each cycle."""
LAYER, EXPERT = 1, 0
"""Where the rank of the update is read."""

MEMORY = "arXiv:2307.05695, table 2, from memory: not read again for this page"
PERPLEXITIES = {"250 M": (22.39, 22.48), "350 M": (18.66, 19.32), "1.3 B": (16.83, 17.27)}
"""Model -> of full rank, of ReLoRA, on C4."""
COMPARABLE = max(relora / full for full, relora in PERPLEXITIES.values()) - 1
"""How much higher a perplexity the paper still calls comparable."""


@dataclass(frozen=True)
class Against:
    """A model beside full rank, of one seed."""

    seed: int
    model: str
    perplexity: float
    """Fraction above full rank's; negative below."""
    parts: dict[str, float | None]
    """Quantity -> fraction above full rank's; None where something is not known."""


def audit(bench: Bench) -> Claim:
    """Train, compare, judge. Raises the error that a run ended with."""
    models = tuple(model for model in RATES if not bench.quick or model != "one-cycle")
    load = Load()
    best, rates, restarts = _first_seed(bench, models, load)
    runs = {SEEDS[0]: best}
    for seed in () if bench.quick else SEEDS[1:]:
        runs[seed] = _trained(_launch(bench, models, seed, rates), models)
        load.look()
    found = [against(seed, run, model) for seed, run in runs.items() for model in models if model != FULL]
    verdict, because = judged(found, bench.quick, load.is_shared)
    lines = [line for model in models for line in _lines(model, rates[model], runs)]
    return Claim(
        name=NAME,
        statement=STATEMENT,
        said_by=SAID_BY,
        kind="run here",
        verdict=verdict,
        because=because,
        depends_on=(
            "size: the paper finds ReLoRA comparable from 250 M parameters on; arXiv:2509.12960 (abstract) finds it "
            "worse than full rank from 11 M to 66 M, by loss, Paloma and BLiMP, the more so the larger the model; the "
            f"model here has {_millions(runs)} M, and is a mixture of experts, of which we know no published ReLoRA",
            "budget: 200 steps of 1,024 tokens in five cycles of adapters of rank 16; the settings of the paper's code "
            "(Guitaricet/relora) are cycles of a thousand steps or more and a rank of 128",
            "the warm start: a third of all steps here, a quarter in the paper; without one ReLoRA is much worse "
            "(table 6 there)",
            f"the learning rate: {len(RATES[RELORA])} values for each model, on the first seed, at full length",
            "what 'as well' means: a held-out perplexity at most "
            f"{COMPARABLE:.1%} above full rank's, the largest gap that the paper calls comparable",
            "memory: what a rank had resident at its fullest, libraries and compiled kernels included; for larger "
            "models it is hardly more than tensors",
            "text: far less than an epoch; in all models alike, half of it had been read by the warm start",
            "merging is exact to 1e-5 in logits in a test (tests/adapt/test_relora.py), not measured again here",
        ),
        premises=premises(),
        arithmetic=arithmetic(),
        measured=(*lines, *_states(bench, models), *restarts, load.told),
    )


def against(seed: int, run: dict[str, Trained], model: str) -> Against:
    """A model of a run beside the run's full rank."""
    ours, full = run[model], run[FULL]
    parts = {}
    for quantity in ("peak memory of a rank", "trainable parameters", "tokens/s", "energy"):
        a, b = _amount(ours, quantity), _amount(full, quantity)
        parts[quantity] = None if a is None or not b else a / b - 1
    return Against(seed, model, math.exp(ours.loss - full.loss) - 1, parts)


def judged(found: list[Against], quick: bool, is_shared: bool) -> tuple[Verdict, str]:
    """The verdict, by ReLoRA's perplexity and memory against full rank's in every seed, and its reason."""
    told = "; ".join(_mean(found, model, is_shared) for model in dict.fromkeys(one.model for one in found))
    told = f"On equal tokens, beside full rank: {told}."
    if is_shared:
        told += " Speed and joules are listed but not judged: the machine worked for others too."
    relora = [one for one in found if one.model == RELORA]
    memory = [one.parts["peak memory of a rank"] for one in relora]
    known = [one for one in memory if one is not None]
    if quick:
        return "cannot be told", f"A quick run, one seed and no tuning, shows the method and proves nothing. {told}"
    if len(known) < len(memory) or not known:
        return "cannot be told", f"The peak memory of a rank is missing. {told}"
    holds = [one.perplexity <= COMPARABLE and saved < 0 for one, saved in zip(relora, known, strict=True)]
    if any(holds) and not all(holds):
        return "cannot be told", f"The seeds disagree. {told}"
    return ("holds" if all(holds) else "does not hold here"), told


def premises() -> tuple[Premise, ...]:
    """The published perplexities that 'as well' is taken from."""
    return tuple(
        Premise(f"perplexity of {what}, {size} parameters, C4", value, "", MEMORY)
        for size, pair in PERPLEXITIES.items()
        for what, value in zip(("full rank", "ReLoRA"), pair, strict=True)
    )


def arithmetic() -> tuple[Step, ...]:
    """How far apart they are there."""
    return tuple(
        Step(f"perplexity above full rank's, {size}", f"100 x ({relora} / {full} - 1)", 100 * (relora / full - 1), "%")
        for size, (full, relora) in PERPLEXITIES.items()
    )


def _first_seed(
    bench: Bench, models: tuple[str, ...], load: Load
) -> tuple[dict[str, Trained], dict[str, float], list[Measured]]:
    """Each model at its best rate, the rates, and what ReLoRA's restarts left at its own."""
    best: dict[str, Trained] = {}
    rates: dict[str, float] = {}
    restarts: list[Measured] = []
    for tried in range(1 if bench.quick else len(RATES[FULL])):
        now = {model: RATES[model][tried] for model in models}
        run = _launch(bench, models, SEEDS[0], now)
        load.look()
        for model, one in _trained(run, models).items():
            bench.tell(f"{NAME}: {model} at {now[model]:g}: {one.loss:.4f} nats")
            if model not in best or one.loss < best[model].loss:
                best[model], rates[model] = one, now[model]
                restarts = _restarts(run) if model == RELORA else restarts
    return best, rates, restarts


def asked(models: tuple[str, ...], seed: int, rates: dict[str, float], quick: bool) -> list[str]:
    """What a run changes of the file, for `--set`."""
    settings = [f"seed={seed}", *(f"stages.{model}.train.optimizer.lr={rates[model]}" for model in models)]
    if quick:
        settings += [f"stages.{model}.train.steps={QUICK_STEPS}" for model in (START, *models)]
        settings += [f"stages.{START}.train.schedule.warmup_steps={QUICK_CYCLE}"]
        settings += [f"stages.{RELORA}.train.{key}={QUICK_CYCLE}" for key in CYCLE_KEYS]
    return settings


def _launch(bench: Bench, models: tuple[str, ...], seed: int, rates: dict[str, float]) -> RunDirectory:
    bench.tell(f"{NAME}: training {', '.join(f'{model} at {rates[model]:g}' for model in models)}, seed {seed}")
    file = QUICK_FILE if bench.quick else FILE
    return launch(bench, NAME, file, RUN, asked(models, seed, rates, bench.quick))


def _trained(run: RunDirectory, models: tuple[str, ...]) -> dict[str, Trained]:
    return {model: trained(run, model) for model in models}


def _restarts(run: RunDirectory) -> list[Measured]:
    """What the restarts of a relora stage left: directions in the weights, and forgotten moments."""
    from hpc.bench.rank_growth import growth, ranks_of  # loads torch

    rows = [row for row in history(run.stage(RELORA).metrics) if row.get("merged")]
    ends = [int(row["step"]) for row in rows]
    full = ranks_of(run.stage(START).artifact, run.stage(FULL).artifact, ends[-1], LAYER, EXPERT)
    grown = growth(run, START, RELORA, ends, LAYER, EXPERT)
    how = "measured: singular values of the difference to the warm start, above what rounding can make"
    lines = [
        Measured(f"rank of the update of {matrix}, {model}", ranks[which], "", how)
        for which, matrix in enumerate((f"layer {LAYER}'s query matrix", f"layer {LAYER}'s expert {EXPERT}, down"))
        for model, ranks in [
            *((f"ReLoRA, cycle {cycle}", ranks) for cycle, ranks in enumerate(grown, 1)),
            ("full rank", full),
        ]
    ]
    forgot = min(row["optimizer_forgot"] for row in rows)
    lines.append(Measured("moments of the adapters that a restart set to zero, fewest", 100 * forgot, "%",
                          "measured: counted over all ranks at each restart"))  # fmt: skip
    return lines


def _states(bench: Bench, models: tuple[str, ...]) -> list[Measured]:
    """Bytes of tensors that stay with a rank, without libraries and what comes and goes."""
    planned = {stage.name: stage for stage in plan(load_config(CONFIGS / FILE), bench.machine("local")).stages}
    lines = []
    for model in models:
        memory = planned[model].memory
        assert memory is not None, "it is a training stage"
        parts = ", ".join(part.name for part in memory.states)
        size = sum(part.bytes for part in memory.states) / 2**20
        lines.append(Measured(f"tensors that stay with a rank, {model}", size, "MiB", f"derived: plan; {parts}"))
    return lines


def _lines(model: str, rate: float, runs: dict[int, dict[str, Trained]]) -> list[Measured]:
    """One line for each seed's loss, and one for each quantity, the mean over the seeds."""
    lines = [
        Measured(f"held-out loss of {model}, seed {seed}, learning rate {rate:g}", run[model].loss, "nats",
                 "measured: all held-out tokens, after the last step")
        for seed, run in runs.items()
    ]  # fmt: skip
    joules = next(iter(runs.values()))[model].energy_how
    for quantity, scale, unit, how in (
        ("peak memory of a rank", 2**20, "MiB", "measured: the fullest rank, by the kernel"),
        ("trainable parameters", 1, "", "measured: counted"),
        ("tokens/s", 1, "", "measured: median step"),
        ("energy", 1, "J", f"{joules}; from the first step to the last"),
    ):
        values = [_amount(run[model], quantity) for run in runs.values()]
        known = [value / scale for value in values if value is not None]
        each = f"; seeds: {', '.join(f'{value:.5g}' for value in known)}" if len(set(known)) > 1 else ""
        lines.append(Measured(f"{quantity}, {model}", mean(known) if known else None, unit, how + each))
    return lines


def _amount(run: Trained, quantity: str) -> float | None:
    """Of one training; None where it is not known."""
    found: float | None = {
        "peak memory of a rank": run.metrics.get("peak_memory_bytes"),
        "trainable parameters": run.metrics.get("trainable_params", run.metrics.get("total_params")),
        "tokens/s": run.metrics.get("tokens_per_s"),
        "energy": run.curve[-1].spent.energy_j if run.curve else None,
    }[quantity]
    return found


def _mean(found: list[Against], model: str, is_shared: bool) -> str:
    """A model's mean over the seeds in words, without what the machine's other work decides."""
    own = [one for one in found if one.model == model]
    words = [f"held-out perplexity {_change([one.perplexity for one in own])}"]
    for quantity in own[0].parts:
        known = [part for one in own if (part := one.parts[quantity]) is not None]
        if known and not (is_shared and quantity in ("tokens/s", "energy")):
            words.append(f"{quantity} {_change(known)}")
    return f"{WHAT[model]}: {', '.join(words)}"


def _change(values: list[float]) -> str:
    """+3.1% for a mean of 0.031, with each seed's value where they differ."""
    each = f" (seeds: {', '.join(f'{100 * value:+.1f}%' for value in values)})" if len(set(values)) > 1 else ""
    return f"{100 * mean(values):+.1f}%{each}"


def _millions(runs: dict[int, dict[str, Trained]]) -> str:
    total = next(iter(runs.values()))[FULL].metrics["total_params"]
    return f"{total / 1e6:.1f}"


ENTRY = Entry(NAME, STATEMENT, "run here", audit)
