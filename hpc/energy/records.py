"""What the files of a stage tell about its attempts, put together before anything is judged (hpc/energy/spans.py)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc.energy.curves import NodeSamples
from hpc.run.attempts import newest_step
from hpc.run.directory import StageDirectory, read_jsonl
from hpc.run.timeline import Change, read_timeline


@dataclass
class AttemptRecords:
    """Everything about one attempt."""

    begin: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Its lines of attempts.jsonl."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Its rows of metrics.jsonl."""
    changes: list[Change] = field(default_factory=list)
    samples: list[NodeSamples] = field(default_factory=list)

    @property
    def number(self) -> int:
        """From 1."""
        return int(self.begin["attempt"])

    @property
    def start(self) -> float:
        """When its first process was started, as far as that is known."""
        return min(float(self.begin["time"]), float(self.begin.get("born") or self.begin["time"]))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Nodes of the job; the host on one machine."""
        return tuple(self.begin.get("nodes") or (self.begin["host"],))

    def of(self, event: str) -> list[dict[str, Any]]:
        """Its lines of one event."""
        return [row for row in self.rows if row.get("event") == event]

    @property
    def last_sign(self) -> float:
        """The latest time in any of its records."""
        signs = [self.start, *(float(row["time"]) for row in self.of("end")), *(one.last for one in self.samples)]
        return max([*signs, *(float(row["time"]) for row in self.steps), *(one.time for one in self.changes)])

    @property
    def is_over(self) -> bool:
        """Whether it ended without a result: a rank said so, the job was judged, or all samplers saw it end."""
        told = bool(self.of("verdict")) or any(row["outcome"] != "done" for row in self.of("end"))
        return told or (bool(self.samples) and all(one.has_end for one in self.samples))

    @property
    def reason(self) -> str:
        """Why it ended, in the words of its verdict or of its first rank that ended."""
        verdicts = [row["reason"] for row in self.of("verdict") if row.get("reason")]
        ends = [row["message"] for row in self.of("end") if row.get("message")]
        return str(next(iter(verdicts[-1:] or ends[:1]), "it ended without a word"))


@dataclass(frozen=True)
class StageRecords:
    """Everything about a stage."""

    kind: str
    maker: int | None
    """The attempt that wrote the receipt; None while there is none."""
    is_aside: bool
    """Whether it was made again: it is one of RUN/superseded."""
    attempts: tuple[AttemptRecords, ...]
    newest_checkpoint: int
    submits: tuple[float, ...]
    """When it was submitted, if it ever waited in a queue."""
    eligible: float
    """When the last of what it needs was done; 0 when that is not known."""


def read_records(stage_root: Path, samples: Sequence[NodeSamples], finishing: int | None = None) -> StageRecords:
    """Read a stage's files; `samples` are those of `read_samples`, `finishing` the attempt that is about to write the
    receipt."""
    directory = StageDirectory(stage_root)
    task, receipt = _json(directory.task), _json(directory.receipt)
    lines = read_jsonl(directory.attempts)
    first, end = _own_attempts(stage_root, lines)
    submits = [float(row["time"]) for row in lines if row.get("event") == "submit"]
    return StageRecords(
        kind=str(task.get("stage", {}).get("kind", "")),
        maker=int(receipt["attempts"]) if receipt else finishing,
        is_aside=stage_root.parent.name == "superseded",
        attempts=tuple(_gather(directory, lines, samples, first, end)),
        newest_checkpoint=newest_step(directory),
        submits=tuple(submits if first == 1 else []),
        eligible=_needs_done(stage_root, task),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _own_attempts(stage_root: Path, lines: list[dict[str, Any]]) -> tuple[int, float]:
    """The range of attempts that belong here: a stage that was set aside while a job ran shares its record with the
    stage that followed, and a line says where one ends."""
    first = 1
    for row in lines:
        if row.get("event") == "superseded":
            if row["folder"] == stage_root.name and stage_root.parent.name == "superseded":
                return first, int(row["attempt"])
            first = int(row["attempt"])
    return first, float("inf")


def _gather(
    directory: StageDirectory,
    lines: list[dict[str, Any]],
    samples: Sequence[NodeSamples],
    first: int,
    end: float,
) -> list[AttemptRecords]:
    found = {
        int(row["attempt"]): AttemptRecords(row)
        for row in lines
        if row.get("event") == "start" and first <= int(row["attempt"]) < end
    }
    for row in lines:
        if row.get("event") in ("end", "verdict", "node") and row["attempt"] in found:
            found[row["attempt"]].rows.append(row)
    for row in read_jsonl(directory.metrics):
        if "step" in row and row.get("attempt") in found:
            found[row["attempt"]].steps.append(row)
    for change in read_timeline(directory):
        if change.attempt in found:
            found[change.attempt].changes.append(change)
    for one in samples:
        if one.attempt not in found:  # an attempt that nobody recorded: its energy still counts
            begin = {"event": "start", "attempt": one.attempt, "time": one.start, "host": one.host}
            found[one.attempt] = AttemptRecords(begin)
        found[one.attempt].samples.append(one)
    return [found[number] for number in sorted(found)]


def _needs_done(stage_root: Path, task: dict[str, Any]) -> float:
    """When the last of what a stage needs was done; 0 when that is not known."""
    times = [0.0]
    for need in task.get("stage", {}).get("needs", []):
        rows = read_jsonl(StageDirectory(stage_root.parent.parent / "stages" / need).attempts)
        times += [float(row["time"]) for row in rows if row.get("event") == "end" and row["outcome"] == "done"]
    return max(times)
