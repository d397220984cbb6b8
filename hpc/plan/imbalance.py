"""How unevenly tokens reach the ranks that share a set of experts.

A load of 1 is an even share. Three loads are told: `mean` is 1, `worst` is the most that can happen at all, `p99` the
one that memory is planned for. It comes from a run where there is one (the `router_load` of every step in its
metrics.jsonl, or the router passport beside its weights), and from a stated model where there is none.

Shape letters: L MoE layers, E experts, P ranks of an expert-parallel group, K experts per token.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from hpc.config import Router
from hpc.errors import ArtifactError

EXPERT_SPREAD = 0.5
"""Standard deviation of the experts' loads over their mean, assumed where none was measured."""
SIGMAS = 2.33
"""99 % of a normal distribution lie below the mean + 2.33 standard deviations."""
PASSPORT = "router_passport.json"
"""As hpc/model/routing.py writes it, beside the weights of a model and of a checkpoint."""


@dataclass(frozen=True)
class Imbalance:
    """Loads of the fullest rank of an expert-parallel group, over an even share."""

    mean: float
    p99: float
    worst: float
    how: str


Loads = Sequence[Sequence[float]]
"""Part of the assignments of each expert, (L, E)."""


def imbalance(router: Router, group: int, measured: "Histogram | None" = None) -> Imbalance:
    """For expert-parallel groups of `group` ranks."""
    if group == 1:
        return Imbalance(1.0, 1.0, 1.0, "derived: every rank has all experts")
    local = router.num_experts // group
    worst = group * min(1.0, local / router.top_k)
    if measured is not None and measured.num_experts == router.num_experts:
        return Imbalance(1.0, min(worst, measured.p99(group)), worst, f"measured: {measured.source}")
    # The mean of `local` of E loads without replacement: variance s^2 / local x (E - local) / (E - 1).
    spread = EXPERT_SPREAD * sqrt((1 - local / router.num_experts) / local)
    p99 = min(worst, 1 + SIGMAS * spread)
    return Imbalance(1.0, p99, worst, f"estimated: experts' loads with a spread of {EXPERT_SPREAD:g} of their mean")


@dataclass(frozen=True)
class Histogram:
    """What the routers of a run did: one (L, E) for each step, or one for a window of steps."""

    steps: tuple[Loads, ...]
    source: str

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.steps[0][0])

    def p99(self, group: int) -> float:
        """99th percentile over steps of the load of the fullest rank, taken over the layers together: memory is that
        of all of them."""
        return percentile([max(rank_loads(step, group)) for step in self.steps], 0.99)


def rank_loads(loads_LE: Loads, group: int) -> list[float]:
    """Load of each rank, mean over layers. Ranks hold E / P experts each, in order."""
    size = len(loads_LE[0]) // group
    totals = [0.0] * group
    for layer in loads_LE:
        whole = sum(layer) or 1.0
        for rank in range(group):
            totals[rank] += sum(layer[rank * size : (rank + 1) * size]) / whole * group
    return [total / len(loads_LE) for total in totals]


def percentile(values: Iterable[float], part: float) -> float:
    """The value that `part` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def from_passport(path: Path) -> Histogram:
    """Of a file, or of the folder of a stage, an artifact or a checkpoint that has one. Raises ArtifactError."""
    for candidate in (path, path / PASSPORT, path / "artifact" / PASSPORT):
        if candidate.is_file():
            try:
                content: dict[str, Any] = json.loads(candidate.read_text(encoding="utf-8"))
                window = f"steps {content['first_step']} to {content['last_step']}"
                return Histogram((content["assignments"],), f"router passport of {candidate.parent}, {window}")
            except (ValueError, KeyError, TypeError):
                raise ArtifactError(f"{candidate} is no router passport: name the stage that trained") from None
    raise ArtifactError(f"{path} has no {PASSPORT}: name the folder of a training stage, such as RUN/stages/pretrain")


def from_metrics(path: Path) -> Histogram | None:
    """Of the steps in a stage's metrics.jsonl; None where there are none, or no routers were logged."""
    steps: list[Loads] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if '"router_load"' in line and line.endswith("\n"):
                    steps.append(json.loads(line)["router_load"])
    except (OSError, ValueError, KeyError):
        return None
    return Histogram(tuple(steps), f"router loads of {len(steps)} steps in {path}") if steps else None
