"""`launch.py sync`: send to W&B what the stages of chains could not send themselves, from a login node.

For each stage, in the order in which they began, superseded ones too: a process of its own (hpc/tracking/mirror.py)
asks the server which rows it holds, sends the others from metrics.jsonl, and adds the edges between the artifacts of
finished stages. It is given a time: rows that arrived are there, and the next call asks again and sends the rest. So
`sync` can be interrupted anywhere and repeated at will; a row never goes twice.

The offline fragments themselves are not replayed: `wandb sync` appends a fragment again when it was cut short before,
and `wandb beta sync --live` does not come back after a killed run; what a fragment holds is in metrics.jsonl. The
fragments of a run that is complete get W&B's own mark (.wandb.synced), so that `wandb sync` leaves them alone.
W&B's system metrics of an offline run stay in its fragments.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from hpc.errors import ConfigError, TrackingError
from hpc.run.directory import StageDirectory, read_jsonl
from hpc.run.receipt import read_receipt
from hpc.tracking import wandb
from hpc.tracking.mirror import end, is_running, sent_path
from hpc.tracking.rows import rows_of
from hpc.tracking.ticket import Ticket

State = Literal["sent", "complete", "skipped", "left"]


@dataclass(frozen=True)
class Synced:
    """What became of one stage."""

    stage: str
    state: State
    """sent now, complete before, skipped because it sends by itself, or left for the next call."""
    sent: int
    """Rows that went now."""
    rows: int
    """Rows of the stage."""
    edges: int
    """Edges between artifacts that were added now."""
    note: str = ""

    def __str__(self) -> str:
        if self.state == "sent":
            edges = f", {self.edges} artifact edges" if self.edges else ""
            return f"{self.stage}: {self.sent} of {self.rows} rows sent{edges}{self.note}"
        if self.state == "complete":
            return f"{self.stage}: nothing new, all {self.rows} rows are there"
        return f"{self.stage}: {self.state}: {self.note}"


def sync(runs: list[Path], timeout_s: float, tell: Callable[[Synced], None]) -> list[Synced]:
    """Send what is left of some chains, stage by stage. timeout_s: for each stage.

    Raises ConfigError where a run has nothing to send, TrackingError when something is left.
    """
    chains = [list(stages(run)) for run in runs]
    told: list[Synced] = []
    for run, found in zip(runs, chains, strict=True):
        if not found:
            raise ConfigError(f"{run} has nothing for W&B: no run directory, or tracking.wandb was disabled")
        for root in found:
            told.append(_sync(root, run, timeout_s))
            tell(told[-1])
    left = [item for item in told if item.state == "left"]
    if left:
        raise TrackingError(
            f"{len(left)} of {len(told)} stages are not complete at {wandb.server()}: run the same command again; it "
            "sends what is missing and nothing twice"
        )
    return told


def stages(run: Path) -> Iterator[Path]:
    """Folders of the stages that have a W&B run, superseded ones too, in the order in which they began."""
    found = [path for place in ("superseded", "stages") for path in run.glob(f"{place}/*")]
    yield from sorted((path for path in found if Ticket.path(path).exists()), key=_began)


def _began(root: Path) -> float:
    return min((row["time"] for row in read_jsonl(StageDirectory(root).attempts)), default=0.0)


def _sync(root: Path, run: Path, timeout_s: float) -> Synced:
    """One stage. What goes wrong becomes its note."""
    name = str(root.relative_to(run)).removeprefix("stages/")
    ticket, running = Ticket.read(root), is_running(root)
    rows = rows_of(root, ticket.has_steps)
    for _ in rows.new(is_over=not running):
        pass
    if running and ticket.mode == "online":
        return Synced(name, "skipped", 0, rows.count, 0, "it is running online and sends its rows itself")
    if _is_complete(root, rows.count):
        return Synced(name, "complete", 0, rows.count, 0)
    why = wandb.unreachable()
    if why:
        return Synced(name, "left", 0, rows.count, 0, f"{wandb.server()} does not answer ({why})")
    with TemporaryDirectory(prefix="greenmoe-sync-") as scratch:
        command = [sys.executable, "-m", "hpc.tracking.mirror", str(root), "--once", scratch]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return Synced(name, "left", 0, rows.count, 0, f"not done within {timeout_s:.0f} s; what arrived is kept")
        finally:
            end(process)
    if process.returncode:
        return Synced(name, "left", 0, rows.count, 0, _reason(errors))
    result = json.loads(output.splitlines()[-1])
    if not running:
        for fragment in wandb.fragments(root, ticket.id):
            fragment.with_suffix(".wandb.synced").touch()
    note = "; it is running, the rest follows with the next call" if running else ""
    return Synced(name, "sent", result["sent"], result["rows"], result["edges"], note)


def _is_complete(root: Path, rows: int) -> bool:
    """Whether an earlier call sent all there is, to the same server."""
    if not sent_path(root).exists():
        return False
    receipt = read_receipt(StageDirectory(root))
    now = {"server": wandb.server(), "rows": rows, "receipt": receipt.digest if receipt else None, "edges": True}
    known: dict[str, object] = json.loads(sent_path(root).read_text(encoding="utf-8"))
    return known == now


def _reason(errors: str) -> str:
    """The last line of a traceback, shortened."""
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason was given"
