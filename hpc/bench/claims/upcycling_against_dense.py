"""'Upcycling beats training the dense model on': a model pretrained here, made sparse, against itself, at equal FLOPs.

Runs configs/claims-upcycle-ways.yaml as a user does (`launch.py run`), once for each of SEEDS: a dense model is
pretrained; it is trained on as it is, and as mixtures of experts made of it in several ways, on text that none has
seen, each for as many FLOPs. Their losses on held-out text are compared. Neither FLOPs nor losses depend on who else
uses the machine.
"""

from dataclasses import dataclass
from statistics import mean

from hpc.bench.claims.claim import Bench, Claim, Entry, Measured, Premise, Step, Verdict
from hpc.bench.claims.trained import launch, trained
from hpc.run.directory import RunDirectory

NAME = "upcycling-against-dense"
STATEMENT = (
    "A dense model made into a mixture of experts and trained on is better than itself trained on, at equal FLOPs."
)
SAID_BY = (
    "Komatsuzaki et al. 2022 (arXiv:2212.05055) and NVIDIA (arXiv:2410.07524), for models of 220 M to 15 B parameters"
)
RUN = "claims-upcycle"
DENSE, SPARSE = "dense", "sparse"
WAYS = {
    SPARSE: "8 experts of half the width, 2 a token",
    "noisy": "the same with noise of 0.1",
    "copies": "8 copies of the whole block, 2 a token, for fewer steps",
}
"""Stage -> how the mixture is made of the dense model; the first one decides."""
SEEDS = (1, 2)
QUICK_STEPS = 20
EQUAL = 0.01
"""Largest accepted difference between two budgets of FLOPs, as a fraction."""


@dataclass(frozen=True)
class Continued:
    """One model trained on."""

    before: float
    """Held-out loss before the first step."""
    loss: float
    """After the last step; both over all held-out tokens, in nats."""
    flops: float
    tokens: int
    seconds: float
    """Median step x steps."""


@dataclass(frozen=True)
class Contest:
    """All models of one seed; `dense` among them."""

    seed: int
    models: dict[str, Continued]

    def gain(self, way: str) -> float:
        """Nats by which a mixture ends below the dense model; negative where it ends above."""
        return self.models[DENSE].loss - self.models[way].loss


def audit(bench: Bench) -> Claim:
    """Train, compare, judge. Raises the error that a run ended with."""
    ways = [SPARSE] if bench.quick else list(WAYS)
    contests = [_contest(bench, ways, seed) for seed in (SEEDS[:1] if bench.quick else SEEDS)]
    verdict, because = judged(contests, bench.quick)
    dense = contests[0].models[DENSE]
    return Claim(
        name=NAME,
        statement=STATEMENT,
        said_by=SAID_BY,
        kind="run here",
        verdict=verdict,
        because=because,
        depends_on=(
            f"how much is trained on: here {dense.tokens:,} tokens, as many as the dense model had read; the published "
            "gains need about half of the dense model's budget or more (arXiv:2212.05055) and grow with it, up to 1 T "
            "tokens (arXiv:2410.07524); before that the copies of an expert are still nearly the same",
            "how many tokens an expert sees: with 8 of half the width and 2 a token, a quarter of those that the dense "
            "block sees",
            "what is counted: FLOPs; a mixture holds more parameters, takes more memory, and is slower a FLOP on a CPU",
            "one learning rate for all (that of the dense model's pretraining), cosine to a tenth; optimizers start "
            "anew on both sides",
            "one size: 4 layers of 256, 4.7 M parameters, English of one kind",
        ),
        premises=premises(),
        arithmetic=arithmetic(),
        measured=tuple(line for contest in contests for line in _lines(contest)),
    )


def judged(contests: list[Contest], quick: bool) -> tuple[Verdict, str]:
    """The verdict by the first way, over all seeds, and its reason."""
    ways = [way for way in contests[0].models if way != DENSE]
    told = "; ".join(_told(contests, way) for way in ways)
    told = f"After equally many FLOPs, beside the dense model trained on: {told}."
    if quick:
        return "cannot be told", f"A quick run, one seed and a few steps, shows the method and proves nothing. {told}"
    for contest in contests:
        for way, model in contest.models.items():
            if abs(model.flops / contest.models[DENSE].flops - 1) > EQUAL:
                return "cannot be told", f"The budgets are not equal: {way} took {model.flops:.3g} FLOP. {told}"
    winners = [way for way in ways if all(contest.gain(way) > 0 for contest in contests)]
    if SPARSE in winners:
        return "holds", told
    if winners:
        return "holds if", f"it is made of {' or '.join(WAYS[way] for way in winners)}. {told}"
    return "does not hold here", told


def premises() -> tuple[Premise, ...]:
    """What was published."""
    return (
        Premise("MMLU of Nemotron-4 15B upcycled, after 1 T tokens", 67.6, "%", "arXiv:2410.07524, abstract"),
        Premise("MMLU of the dense model trained on, after as many", 65.3, "%", "arXiv:2410.07524, abstract"),
        Premise(
            "budget beyond the dense model's with which upcycled T5 and ViT are significantly better, about", 50, "%",
            "arXiv:2212.05055, abstract, from memory",
        ),
    )  # fmt: skip


def arithmetic() -> tuple[Step, ...]:
    """From the published figures."""
    return (Step("published gain", "67.6 - 65.3", 67.6 - 65.3, "points of MMLU"),)


def _told(contests: list[Contest], way: str) -> str:
    gains = [contest.gain(way) for contest in contests]
    seeds = f" (seeds: {', '.join(f'{-gain:+.3f}' for gain in gains)})" if len(gains) > 1 else ""
    return f"{way} ({WAYS[way]}) {-mean(gains):+.3f} nats{seeds}"


def _contest(bench: Bench, ways: list[str], seed: int) -> Contest:
    models = [DENSE, *ways]
    bench.tell(f"{NAME}: base, then {', '.join(models)}, seed {seed}")
    settings = [f"seed={seed}"]
    if bench.quick:
        settings += [f"stages.{stage}.train.steps={QUICK_STEPS}" for stage in ("base", *models)]
        settings += ["stages.base.train.schedule.warmup_steps=5"]
    file = "claims-upcycle.yaml" if bench.quick else "claims-upcycle-ways.yaml"
    run = launch(bench, NAME, file, RUN, settings)
    return Contest(seed, {model: _continued(run, model) for model in models})


def _continued(run: RunDirectory, stage: str) -> Continued:
    metrics = trained(run, stage).metrics
    return Continued(
        before=metrics["heldout_loss_before"],
        loss=metrics["heldout_loss"],
        flops=metrics["flops"],
        tokens=metrics["tokens"],
        seconds=metrics["tokens"] / metrics["tokens_per_s"],
    )


def _lines(contest: Contest) -> list[Measured]:
    told = []
    for name, model in contest.models.items():
        how = "measured: all held-out tokens, after the last step; derived: "
        more = f"{model.before:.4f} before, {model.flops:.4g} FLOP, {model.tokens:,} tokens in {model.seconds:.0f} s"
        told.append(Measured(f"held-out loss of {name}, seed {contest.seed}", model.loss, "nats", how + more))
    return told


ENTRY = Entry(NAME, STATEMENT, "run here", audit)
