"""Gates: what a stage demands of earlier receipts before it runs, such as `pretrain.heldout_loss < 3.2`."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
PATTERN = re.compile(
    r"^\s*(?:(?P<stage>[a-z0-9][a-z0-9._-]*)\.)?(?P<metric>[a-z_][a-z0-9_]*)\s*(?P<sign><=|>=|<|>)\s*"
    r"(?P<limit>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*$"
)


@dataclass(frozen=True)
class Gate:
    """One demand on a metric of an earlier stage."""

    text: str
    stage: str | None
    """None: every needed stage whose receipt has the metric."""
    metric: str
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """Read `[STAGE.]METRIC < LIMIT` (or <=, >, >=). Raises ValueError."""
        found = PATTERN.match(text)
        if found is None:
            raise ValueError(f"gate {text!r} is not of the form [STAGE.]METRIC < NUMBER (or <=, >, >=)")
        return cls(" ".join(text.split()), found["stage"], found["metric"], found["sign"], float(found["limit"]))

    def missed(self, metrics: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Why the gate is missed, given stage -> metrics of the receipts; None when it holds."""
        asked = {self.stage: metrics.get(self.stage, {})} if self.stage else metrics
        values = {name: found[self.metric] for name, found in asked.items() if found.get(self.metric) is not None}
        if not values:
            return f"gate {self.text!r}: no receipt of {', '.join(map(str, asked)) or 'its needs'} has {self.metric}"
        for name, value in values.items():
            if not OPERATORS[self.sign](float(value), self.limit):
                return f"gate {self.text!r} missed: {name} has {self.metric} = {float(value):.6g}"
        return None
