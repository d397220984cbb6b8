"""'Starting from a model that exists saves training': a base adapted to another text, and the same shape from scratch.

Runs configs/claims-reuse.yaml as a user does (`launch.py run`), once for each of SEEDS. For each task the adapted model
is compared with the one from scratch at the lowest held-out loss that both reached: tokens, FLOPs, seconds and joules,
first by themselves, as if the base had cost nothing, then with all that the base had taken: what only the adapted model
stands on, by the product's own lineage (hpc/energy/lineage.py). Between the two lies the number of adaptations after
which a base has paid for itself.

Tokens and FLOPs do not depend on who else uses the machine; seconds and joules do, and are then not judged.
"""

from dataclasses import dataclass
from math import fsum

from hpc.bench.claims.claim import QUOTED, Bench, Claim, Entry, Measured, Verdict
from hpc.bench.claims.savings import UNITS, Amounts, Saving, compared, lines, means
from hpc.bench.claims.trained import Load, launch, trained
from hpc.energy.lineage import ancestry
from hpc.run.directory import RunDirectory, StageDirectory
from hpc.run.receipt import read_receipt

NAME = "reuse-against-scratch"
STATEMENT = "Starting from a model that exists takes less training, time and energy than starting from scratch."
RUN = "claims-reuse"
TASKS = {"modern": "near to the base's text", "python": "far from the base's text"}
SEEDS = (1, 2)
QUICK_TASK, QUICK_STEPS = "modern", {"base": 20, "adapted": 10, "scratch": 20}
STEADY = ("FLOPs", "tokens")
"""What is the same on a busy machine."""


@dataclass(frozen=True)
class Pair:
    """One task in one run."""

    task: str
    free: Saving
    """The adapted model against the one from scratch; its base costs nothing."""
    full: Saving
    """The same, with all that its base took."""
    uses: float | None
    """Adaptations like this one after which the base has paid for itself, in FLOPs; None when it never does."""


def audit(bench: Bench) -> Claim:
    """Train, compare, judge. Raises the error that a run ended with."""
    pairs, told, load = [], [], Load()
    for seed in SEEDS[:1] if bench.quick else SEEDS:
        bench.tell(f"{NAME}: base, adapted and from scratch, seed {seed}")
        settings = [f"seed={seed}", *(_quick_settings() if bench.quick else ())]
        run = launch(bench, NAME, f"{RUN}.yaml", RUN, settings)
        load.look()
        for task in [QUICK_TASK] if bench.quick else TASKS:
            pairs.append(_pair(run, task, seed))
            told += _losses(run, task, seed)
    verdict, because = judged(pairs, bench.quick, load.is_shared)
    return Claim(
        name=NAME,
        statement=STATEMENT,
        said_by=QUOTED,
        kind="run here",
        verdict=verdict,
        because=because,
        depends_on=(
            "whether the base is there already: then its energy was spent by others and is embodied, not drawn again "
            "(`launch.py ledger` states it beside a run's own); else it counts, divided by how often it is used",
            "how near the task is to what the base has read: addresses since 2000 against the Python reference",
            "how much text the task has: with enough of it, training from scratch catches up, and the base's share of "
            "the whole shrinks",
            f"the size of the base: here it has read {_base_tokens(pairs[0]):,.0f} tokens; models of the Hub have read "
            "trillions, and no task pays that back alone",
            "one vocabulary for both sides, that of the base's text: a tokenizer of the task's own would help training "
            "from scratch",
            "the stop: the lowest held-out loss that both reach; constant learning rates, 3e-3 from scratch and 1e-3 "
            "adapted, neither tuned; held-out loss every 10 steps, a straight line between",
        ),
        measured=(
            *(
                line
                for pair in pairs
                for line in (*lines(pair.free), *lines(pair.full, ", base included"), _uses(pair))
            ),
            *told,
            load.told,
        ),
    )


def judged(pairs: list[Pair], quick: bool, is_shared: bool) -> tuple[Verdict, str]:
    """The verdict and its reason. Seconds and joules count only where the machine had nothing else to do."""
    counted = STEADY if is_shared else tuple(UNITS)
    tasks = list(dict.fromkeys(pair.task for pair in pairs))
    told = "; ".join(_told(task, [pair for pair in pairs if pair.task == task], counted) for task in tasks)
    told = f"To the same held-out loss, beside training from scratch, {told}."
    if is_shared:
        told += " The machine worked for others too: seconds and joules are not judged."
    if quick:
        return "cannot be told", f"A quick run, one seed and one task, shows the method and proves nothing. {told}"
    if any(pair.free.parts[quantity] is None for pair in pairs for quantity in counted):
        return "cannot be told", f"Joules are missing. {told}"
    if not all(_saves(pair.free, counted) for pair in pairs):
        return "does not hold here", told
    if all(_saves(pair.full, counted) for pair in pairs):
        return "holds", told
    uses = [pair.uses for pair in pairs if pair.uses is not None]
    return "holds if", (
        f"the base is there already, or is adapted {max(uses):.1f} times or more: so many tasks like the hardest one "
        f"here pay back its FLOPs. {told}"
    )


def _told(task: str, pairs: list[Pair], counted: tuple[str, ...]) -> str:
    free, full = (means(savings, counted) for savings in ([p.free for p in pairs], [p.full for p in pairs]))
    return f"{task} ({TASKS[task]}): {free}, with all of the base's training {full}"


def _saves(saving: Saving, counted: tuple[str, ...]) -> bool:
    return all((saving.parts[quantity] or 0.0) > 0 for quantity in counted)


def base_amounts(run: RunDirectory, adapted: str, scratch: str) -> Amounts:
    """What only the adapted model stands on: its base. Joules of all attempts, seconds of the one that finished.

    Text and tokenizer serve both models, and count for neither. Raises ArtifactError.
    """
    shared = {one.digest for one in ancestry(run.stage(scratch).root)}
    own = run.stage(adapted)
    bases = [one for one in ancestry(own.root) if one.digest not in shared and one.stage != adapted]
    receipts = [read_receipt(StageDirectory(own.root.parent / one.stage)) for one in bases]
    metrics = [receipt.metrics for receipt in receipts if receipt is not None]
    joules = [one.energy_j for one in bases if one.energy_j is not None]
    return {
        "energy": fsum(joules) if len(joules) == len(bases) else None,
        "time": fsum(receipt.seconds for receipt in receipts if receipt is not None),
        "FLOPs": fsum(figures["flops"] for figures in metrics),
        "tokens": fsum(figures["tokens"] for figures in metrics),
    }


def pays_back_after(base: float, saving: Saving) -> float | None:
    """Adaptations after which the FLOPs of a base are saved; None when an adaptation saves none."""
    ours, theirs = saving.spent["FLOPs"]
    if ours is None or theirs is None or theirs <= ours:
        return None
    return base / (theirs - ours)


def _pair(run: RunDirectory, task: str, seed: int) -> Pair:
    names = f"adapted-{task}", f"scratch-{task}"
    adapted, scratch = (trained(run, name) for name in names)
    base = base_amounts(run, *names)
    free = compared(seed, adapted, names[1], scratch)
    flops = base["FLOPs"]
    assert flops is not None, "receipts of pretraining have it"
    return Pair(task, free, compared(seed, adapted, names[1], scratch, base), pays_back_after(flops, free))


def _losses(run: RunDirectory, task: str, seed: int) -> list[Measured]:
    how = "measured: all held-out tokens of the task, "
    receipt = read_receipt(run.stage(f"adapted-{task}"))
    before = receipt.metrics["heldout_loss_before"] if receipt else None
    after = [(name, trained(run, f"{name}-{task}").loss) for name in ("adapted", "scratch")]
    return [
        Measured(f"held-out loss of base on {task}, seed {seed}", before, "nats", how + "before the first step"),
        *(Measured(f"held-out loss of {name}-{task}, seed {seed}", loss, "nats", how + "after the last step")
          for name, loss in after),
    ]  # fmt: skip


def _base_tokens(pair: Pair) -> float:
    return (pair.full.spent["tokens"][0] or 0.0) - (pair.free.spent["tokens"][0] or 0.0)


def _uses(pair: Pair) -> Measured:
    name = f"adaptations like {pair.task}, seed {pair.free.seed}, that pay back the base"
    return Measured(name, pair.uses, "", "derived: FLOPs of the base / FLOPs that one saves")


def _quick_settings() -> list[str]:
    steps = [f"stages.{stage}.train.steps={steps}" for stage, steps in QUICK_STEPS.items()]
    tasks = [f"stages.{stage}.matrix.task=[{QUICK_TASK}]" for stage in ("adapted", "scratch")]
    warmups = [f"stages.{stage}.train.schedule.warmup_steps=5" for stage in ("base", "scratch")]
    return [*steps, *tasks, *warmups, "stages.base.train.evaluate_every_steps=20"]


ENTRY = Entry(NAME, STATEMENT, "run here", audit)
