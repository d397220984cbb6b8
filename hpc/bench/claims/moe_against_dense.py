"""'A mixture of experts takes 65 % less energy': dense and MoE trained here, until the same held-out loss.

Runs configs/claims-moe-wide.yaml as a user does (`launch.py run`), several times:

    tuning     each model for TUNING_STEPS steps at each of RATES; the rate with the lowest held-out loss is taken.
               Equal steps for all, so equal tokens; what it costs is told, and is in no comparison
    measured   each model at its rate for the file's steps, once for each of SEEDS

Each dense model is compared with the MoE at the lowest held-out loss that both of them reached: tokens, FLOPs, seconds
and joules until each first reached it. Whichever way it goes, it is told. Seconds and joules of a machine that also
works for others are not the models' own: then there is no verdict. What larger models would save is arithmetic
(moe_on_paper.py). The run directories take half a gigabyte.
"""

from hpc.bench.claims import moe_on_paper
from hpc.bench.claims.claim import QUOTED, Bench, Claim, Entry, Measured, Verdict
from hpc.bench.claims.savings import Saving, compared, flops_per_token, lines, means
from hpc.bench.claims.trained import Load, Trained, launch, trained

NAME = "moe-against-dense"
STATEMENT = "A mixture of experts needs 65 % less energy than a dense model of the same quality."
RUN = "claims-moe"
MOE, RIVALS = "moe", ("dense", "dense-wide")
WHAT = {"dense": "dense, as many active parameters", "dense-wide": "dense, as many parameters in all"}
RATES, TUNING_STEPS, SEEDS = (1.5e-3, 3e-3, 6e-3), 50, (1, 2)
QUICK_STEPS = 40


def audit(bench: Bench) -> Claim:
    """Train, compare, judge. Raises the error that a run ended with."""
    rivals = RIVALS[:1] if bench.quick else RIVALS
    models = (MOE, *rivals)
    rates = dict.fromkeys(models, 3e-3) if bench.quick else _tuned(bench, models)
    savings, told, load = [], [], Load()
    for seed in SEEDS[:1] if bench.quick else SEEDS:
        runs = _run(bench, models, seed, rates, QUICK_STEPS if bench.quick else None)
        load.look()
        savings += [compared(seed, runs[MOE], rival, runs[rival]) for rival in rivals]
        told += [
            Measured(f"held-out loss of {model}, seed {seed}, learning rate {rates[model]:g}", run.loss, "nats",
                     "measured: all held-out tokens, after the last step")
            for model, run in runs.items()
        ]  # fmt: skip
    told.append(load.told)
    verdict, because = judged(savings, bench.quick, load.is_shared)
    flops = max(flops_per_token(run) * run.curve[-1].spent.tokens for run in runs.values())
    return Claim(
        name=NAME,
        statement=STATEMENT,
        said_by=QUOTED,
        kind="run here",
        verdict=verdict,
        because=because,
        depends_on=(
            "what is compared: at equal total parameters (dense-wide) the dense model computes more per token, at "
            "equal active ones the MoE holds more; the claim says neither",
            "size and budget: by the scaling law a mixture of 8 experts saves "
            f"{moe_on_paper.saved_flops(8, 1e20):.0%} of the FLOPs of a dense model of 1e20, one of 32 experts "
            f"{moe_on_paper.saved_flops(32, 1e20):.0%}, and more at 1e22; 65 % less is in reach there, if the MoE "
            "computes nearly as fast per FLOP",
            f"what is run here is {1e20 / flops:.0e} times smaller than 1e20 FLOPs: an expert sees a quarter of the "
            "few hundred thousand tokens, and head and attention, the same in both, are more than half of the FLOPs",
            "two CPU cores: time follows FLOPs, dispatch and the exchange between two ranks come on top of the MoE's; "
            "joules are a power model's wherever no counter can be read, so they follow time",
            "routing: top-2 of 8, balancing loss 0.01, no token dropped",
            "the stop: constant learning rate, tuned over "
            f"{len(RATES)} values for {TUNING_STEPS} steps each; held-out loss every 20 steps, a straight line between",
            "quality as held-out loss: on reasoning tasks mixtures gain less than on knowledge (arXiv:2410.19034)",
        ),
        premises=moe_on_paper.premises(),
        arithmetic=moe_on_paper.arithmetic(),
        measured=(*(line for saving in savings for line in lines(saving)), *told),
    )


def judged(savings: list[Saving], quick: bool, is_shared: bool) -> tuple[Verdict, str]:
    """The verdict, by the energy against the dense model of as many active parameters, and its reason."""
    told = "; ".join(_mean(savings, rival) for rival in dict.fromkeys(saving.rival for saving in savings))
    told = f"To the same held-out loss: {told}."
    energies = [saving.parts["energy"] for saving in savings if saving.rival == RIVALS[0]]
    known = [energy for energy in energies if energy is not None]
    if quick:
        return "cannot be told", f"A quick run, one seed and no tuning, shows the method and proves nothing. {told}"
    if is_shared:
        return "cannot be told", f"The machine worked for others too: seconds and joules are not the models'. {told}"
    if len(known) < len(energies) or not known:
        return "cannot be told", f"Joules are missing. {told}"
    return ("holds" if min(known) >= moe_on_paper.CLAIMED.value else "does not hold here"), told


def _mean(savings: list[Saving], rival: str) -> str:
    return f"the MoE beside {WHAT[rival]}: {means([saving for saving in savings if saving.rival == rival])}"


def _tuned(bench: Bench, models: tuple[str, ...]) -> dict[str, float]:
    """The learning rate of each model, by its held-out loss after equally many steps."""
    found: dict[str, dict[float, float]] = {model: {} for model in models}
    for rate in RATES:
        for model, run in _run(bench, models, SEEDS[0], dict.fromkeys(models, rate), TUNING_STEPS).items():
            found[model][rate] = run.loss
            bench.tell(f"{NAME}: {model} at {rate:g}: {run.loss:.4f} nats after {TUNING_STEPS} steps")
    return {model: min(losses, key=lambda rate: losses[rate]) for model, losses in found.items()}


def _run(
    bench: Bench, models: tuple[str, ...], seed: int, rates: dict[str, float], steps: int | None
) -> dict[str, Trained]:
    """`launch.py run`, and what it left. The run directory is the same every time: its text is prepared once."""
    file = "claims-moe-wide.yaml" if RIVALS[1] in models else "claims-moe.yaml"
    settings = [f"seed={seed}"]
    for model in models:
        settings.append(f"stages.{model}.train.optimizer.lr={rates[model]}")
        if steps is not None:
            settings += [f"stages.{model}.train.steps={steps}", f"stages.{model}.train.evaluate_every_steps=10"]
    bench.tell(f"{NAME}: training {', '.join(models)}, seed {seed}" + (f", {steps} steps" if steps else ""))
    run = launch(bench, NAME, file, RUN, settings)
    return {model: trained(run, model) for model in models}


ENTRY = Entry(NAME, STATEMENT, "run here", audit)
