"""The rows of a stage as W&B shows them: a pure function of the stage's files, the same whoever computes it and when.

A training stage has one row for each row of metrics.jsonl, numbered from 0; the number is W&B's own `_step`, so that
whoever holds the last number knows what is missing. A row carries the figures of metrics.jsonl under the same names,
lists spread over keys (`router_entropy/layer_3`), absent figures left out, and three more: `energy_kwh` and
`j_per_token`, derived from `energy_j`, and `_timestamp`, its own time.

A step that was done before (after a requeue, or a return to a checkpoint) has its row too, marked `replayed`, with what
it cost (`KEPT_ON_REPLAY`) and without a second loss; so has a step that was thrown away (`rolled_back_to`), whose loss
comes with the row that replaces it.

A stage that logs no steps has one row for each second that its nodes were sampled.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc.run.directory import read_jsonl

KEPT_ON_REPLAY = frozenset(
    {"step", "tokens", "attempt", "time", "tokens_per_s", "node_power_w", "node_energy_j", "energy_j", "problem",
     "rolled_back_to"}
)  # fmt: skip
MOST_LOAD_KEYS = 256
"""A row has one key per layer and expert up to here. Past it, a histogram per layer on every tenth row, which W&B draws
as a heat map over time. Measured with 48 layers of 64 experts: 7.2 ms a row with 3,072 keys, 0.8 ms with histograms."""
LOAD_EVERY = 10

Row = dict[str, Any]


class MetricsRows:
    """Rows of metrics.jsonl, each once: call `new` again for those that were appended since."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._highest = -1
        self.count = 0
        """Rows seen so far."""

    def new(self, *, is_over: bool = False) -> Iterator[tuple[int, Row]]:
        """(number, row as W&B shows it). is_over: nobody appends any more, so a last line without an end is whole."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n") and not is_over:
                    return
                self._offset += len(line)
                try:
                    row = json.loads(line)
                except ValueError:  # a killed writer's
                    continue
                number, self.count = self.count, self.count + 1
                yield number, self._shown(number, row)

    def _shown(self, number: int, row: Row) -> Row:
        step = int(row.get("step", -1))
        if step <= self._highest or "rolled_back_to" in row:
            row = {key: value for key, value in row.items() if key in KEPT_ON_REPLAY}
            if step <= self._highest:
                row["replayed"] = 1
        else:
            self._highest = step
        return flatten(with_derived(row), with_load=number % LOAD_EVERY == 0)


class PowerRows:
    """Rows of a stage that logs no steps; complete only once it is over."""

    def __init__(self, stage_root: Path) -> None:
        self._root = stage_root
        self.count = 0

    def new(self, *, is_over: bool = False) -> Iterator[tuple[int, Row]]:
        """As in MetricsRows; nothing before the stage is over, since nodes' samples arrive in any order."""
        if not is_over:
            return
        for number, row in list(enumerate(power_rows(self._root)))[self.count :]:
            self.count = number + 1
            yield number, flatten(with_derived(row))


def rows_of(stage_root: Path, has_steps: bool) -> MetricsRows | PowerRows:
    """The rows of a stage. has_steps: whether it is one that writes metrics.jsonl."""
    return MetricsRows(stage_root / "metrics.jsonl") if has_steps else PowerRows(stage_root)


def power_rows(stage_root: Path) -> Iterator[Row]:
    """One row per attempt and second: watts and joules of the nodes that were sampled in it; joules add up over all
    attempts and nodes. Rows of an attempt that is over never change."""
    seconds: dict[tuple[int, int], dict[str, Row]] = {}
    for path in sorted(stage_root.glob("energy-*.jsonl")):
        host = path.stem.removeprefix("energy-")
        for sample in read_jsonl(path):
            if sample.get("event") in ("sample", "end"):
                seconds.setdefault((int(sample["attempt"]), int(sample["time"])), {})[host] = sample
    joules: dict[tuple[str, int], float] = {}
    for step, ((attempt, second), samples) in enumerate(sorted(seconds.items())):
        for host, sample in samples.items():
            if sample["total_energy_j"] is not None:
                joules[host, attempt] = sample["total_energy_j"]
        by_host = {host: sum(j for (h, _), j in joules.items() if h == host) for host, _ in joules}
        yield {
            "step": step,
            "attempt": attempt,
            "time": float(second),
            "node_power_w": {host: sample["total_power_w"] for host, sample in samples.items()},
            "node_energy_j": by_host,
            "energy_j": sum(joules.values()) if joules else None,
        }


def with_derived(row: Row) -> Row:
    """The row with kilowatt-hours, joules per token and the time under W&B's name."""
    joules, tokens = row.get("energy_j"), row.get("tokens")
    return {
        **row,
        "energy_kwh": joules / 3.6e6 if joules is not None else None,
        "j_per_token": joules / tokens if joules is not None and tokens else None,
        **({"_timestamp": row["time"]} if "time" in row else {}),
    }


def flatten(row: Row, *, with_load: bool = True) -> Row:
    """W&B keys of a row: nested names are joined by '/', lists get one key per layer, None is left out.

    with_load: whether a load too large for a key per expert is told in this row.
    """
    flat: Row = {}
    for key, value in row.items():
        if key == "router_load":
            flat |= load_keys(value, with_load)
        elif isinstance(value, dict):
            flat |= {f"{key}/{name}": inner for name, inner in flatten(value).items()}
        elif isinstance(value, list):
            flat |= {f"{key}/layer_{index}": inner for index, inner in enumerate(value) if inner is not None}
        elif value is not None:
            flat[key] = value
    return flat


def load_keys(load_LE: list[list[float]], with_load: bool) -> Row:
    """Fraction of each layer's assignments that went to each expert (L layers, E experts)."""
    if sum(map(len, load_LE)) <= MOST_LOAD_KEYS:
        return {f"router_load/layer_{n}/expert_{e}": x for n, layer in enumerate(load_LE) for e, x in enumerate(layer)}
    if not with_load:
        return {}
    return {
        f"router_load/layer_{n}": {"_type": "histogram", "values": layer, "bins": list(range(len(layer) + 1))}
        for n, layer in enumerate(load_LE)
    }
