"""How much a run or a stage may draw, and whether it has: `energy_budget_kwh`.

A stage's budget covers all attempts of that stage; a run's budget covers all stages, superseded ones too. Spent is
what the samplers have counted, lost work included. Rank 0 looks at the newest samples at every step, and at the other
stages of a run every OTHERS_S; a training stage then stops at the step's end, after a checkpoint. What it draws from
the last sample to the end of that checkpoint comes on top of the budget. A stage past its last step ends as it would
without one.

Where nothing can be measured or estimated nothing can be limited: the plan says so before.
"""

import time
from pathlib import Path

from hpc.energy.meter import EnergyMeter
from hpc.errors import BudgetSpent
from hpc.run.attempts import count_attempts
from hpc.run.directory import StageDirectory
from hpc.run.task import TaskFile

JOULES_PER_KWH = 3.6e6
LOOK_S = 0.5
"""Between two looks at this stage's samples: there is one a second."""
OTHERS_S = 10.0
"""Between two looks at those of the other stages."""


class Budget:
    """What a stage may draw, for one attempt. Held by rank 0."""

    def __init__(self, task: TaskFile, directory: StageDirectory, attempt: int, *, counts_earlier: bool = True) -> None:
        """`counts_earlier`: whether earlier attempts belong to this stage; not when it is about to be set aside."""
        self._task, self._directory = task, directory
        self._meter = EnergyMeter(directory.root, attempt)
        self._counts_earlier = counts_earlier
        self._looked = float("-inf")
        self._found: str | None = None
        self._others: dict[Path, tuple[int, EnergyMeter]] = {}
        self._others_j, self._others_due = 0.0, float("-inf")

    @property
    def is_limited(self) -> bool:
        """Whether there is any budget."""
        return self._task.energy_budget_kwh is not None or self._task.stage.energy_budget_kwh is not None

    def spent(self) -> str | None:
        """Which budget is spent, in words; None while none is."""
        if self.is_limited and time.monotonic() >= self._looked + LOOK_S:
            self._found, self._looked = self._look(), time.monotonic()
        return self._found

    def _look(self) -> str | None:
        own_j = sum(self._meter.read().energy_j_by_host.values())
        stage, run = self._task.stage, self._task.energy_budget_kwh
        if stage.energy_budget_kwh is not None and self._counts_earlier:
            used = own_j / JOULES_PER_KWH
            if used >= stage.energy_budget_kwh:
                return f"{used:.4g} kWh are drawn, energy_budget_kwh of the stage is {stage.energy_budget_kwh:g}"
        if run is not None:
            used = (own_j + self._other_stages_j()) / JOULES_PER_KWH
            if used >= run:
                return f"{used:.4g} kWh are drawn by all stages, energy_budget_kwh of the run is {run:g}"
        return None

    def check(self) -> None:
        """Raises BudgetSpent when a budget is spent. For stages of one rank, between two pieces of their work."""
        reason = self.spent()
        if reason:
            raise BudgetSpent(f"{reason}; raise it to go on")

    def _other_stages_j(self) -> float:
        """Joules of all other stages, those that run now among them."""
        if time.monotonic() >= self._others_due:
            run = Path(self._task.run_directory)
            folders = [path for place in ("stages", "superseded") for path in (run / place).glob("*")]
            drawn = [self._other(path) for path in folders if path.is_dir() and path != self._directory.root]
            self._others_j, self._others_due = sum(drawn), time.monotonic() + OTHERS_S
        return self._others_j

    def _other(self, root: Path) -> float:
        attempt = count_attempts(StageDirectory(root))
        known = self._others.get(root)
        if known is None or known[0] != attempt:
            self._others[root] = known = (attempt, EnergyMeter(root, attempt))
        return sum(known[1].read().energy_j_by_host.values())
