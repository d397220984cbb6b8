"""The door to Weights & Biases: a writer of one run, what its files on disk hold, and the edges between artifacts.

Nothing here is called by a process that trains (see hpc/tracking/mirror.py). What was found in wandb 0.31 and is relied
upon here:

* Offline, its transaction log is flushed every 15 s unless told otherwise, and a killed process loses the rest.
* Rows are numbered by `step=`. A number below the last one is dropped online, and moved up by `wandb sync`; so a row is
  logged only when it is not there yet: the server says what it holds when an online run begins (`starting_step`), and
  offline the fragments are read back with W&B's own `leet inspect`.
* `_timestamp` in a row is kept, so rows that are sent later keep their time.
* `use_artifact` raises offline, hence edges are added online, at `launch.py sync`.

Settings whose names begin with x_ are private to 0.31, hence the pin in pyproject.toml.
"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hpc.run.receipt import Receipt
from hpc.tracking.ticket import Ticket

Mode = Literal["online", "offline"]
FLUSH_S = 1.0
"""Most seconds of rows that a killed process leaves out of the fragment on disk."""
INIT_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 5.0
MONITOR_EVERY_S = 5.0
"""Seconds between two samples of W&B's own monitor, whose GPU counters the ledger is compared with."""


class Writer:
    """One process's end of a W&B run. `first` is the number of the first row that the run lacks."""

    def __init__(self, run: Any, first: int) -> None:
        self._run, self.first = run, first

    @classmethod
    def open(
        cls, ticket: Ticket, folder: Path, mode: Mode, *, pid: int | None = None, is_over: bool = True
    ) -> "Writer":
        """Begin the run or go on with it. pid: whose GPUs W&B's monitor looks at, where there are any; None for none.
        is_over: whether finishing says that the run has ended.

        Raises whatever wandb raises, such as UsageError without a key.
        """
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        first = 0 if mode == "online" else rows_on_disk(folder, ticket.id)
        has_monitor = pid is not None and has_gpus()
        run = wandb.init(
            project=ticket.project,
            entity=ticket.entity,
            group=ticket.group,
            job_type=ticket.kind,
            name=ticket.name,
            id=ticket.id,
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=ticket.config,
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                init_timeout=INIT_TIMEOUT_S,
                x_transaction_log_flush_interval=FLUSH_S,
                x_disable_stats=not has_monitor,
                x_disable_meta=pid is None,
                x_save_requirements=pid is not None,
                x_stats_pid=pid or os.getpid(),
                x_stats_sampling_interval=MONITOR_EVERY_S,
                x_update_finish_state=is_over,
            ),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return cls(run, max(first, int(run.starting_step)) if mode == "online" else first)

    def log(self, number: int, row: dict[str, Any]) -> None:
        """Send a row under its number; a row that the run has already is left out."""
        if number >= self.first:
            self._run.log(row, step=number, commit=True)  # without commit it waits for the next one

    def configure(self, values: dict[str, Any]) -> None:
        """Set or replace parts of the configuration."""
        self._run.config.update(values, allow_val_change=True)

    def summarize(self, values: dict[str, Any]) -> None:
        """Set final figures."""
        self._run.summary.update(values)

    def add_edges(self, made: "tuple[str, str, Path] | None", used: "list[tuple[str, str, Path]]") -> None:
        """What the stage made and what it read, as (name, kind, receipt.json) each.

        The artifact is the receipt, which lists every file with its SHA-256: weights and data stay where they are.
        """
        import wandb

        def artifact(name: str, kind: str, receipt: Path) -> Any:
            content = wandb.Artifact(name, kind, metadata={"digest": Receipt(**json.loads(receipt.read_text())).digest})
            content.add_file(str(receipt), name="receipt.json")
            return content

        for name, kind, receipt in used:
            self._run.use_artifact(artifact(name, kind, receipt))
        if made:
            self._run.log_artifact(artifact(*made))

    def finish(self, exit_code: int) -> None:
        """Flush and close. Online this returns when the server has everything."""
        self._run.finish(exit_code=exit_code)


def server() -> str:
    """Address of the W&B server."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def default_entity() -> str:
    """The team or user that the key belongs to."""
    import wandb

    return str(wandb.Api().default_entity)


def unreachable() -> str | None:
    """Why the server does not answer, None when it does. Bounded: wandb itself would wait for minutes."""
    try:
        with urllib.request.urlopen(server(), timeout=PROBE_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}" if error.code >= 500 else None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__


def has_gpus() -> bool:
    """Whether this node has accelerators that W&B's monitor can read."""
    return Path("/dev/kfd").exists() or any(Path("/dev").glob("nvidia[0-9]*"))


def fragments(folder: Path, run_id: str) -> list[Path]:
    """The .wandb files of a run below `folder`, the oldest first: one for each time that it was begun or resumed."""
    found = (folder / "wandb").glob(f"*run-*-{run_id}*/run-{run_id}.wandb")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def rows_on_disk(folder: Path, run_id: str) -> int:
    """Rows of a run that its fragments hold: one more than the last number in them."""
    for path in reversed(fragments(folder, run_id)):
        told = json.loads(inspect("--summary", "--json", str(path)) or "{}")
        if told.get("step") is not None:
            return int(told["step"]) + 1
    return 0


def records(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Records of one kind ('history', 'stats', ...) in a fragment; a record that a kill cut off is not among them."""
    for line in inspect("--json", str(path)).splitlines():
        record = json.loads(line)
        if record["type"] == kind:
            yield record[kind]


def inspect(*arguments: str) -> str:
    """What W&B's own reader of its files prints; nothing when it cannot read them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def gpu_energy_j(stage_root: Path) -> float | None:
    """Joules that W&B's own monitor saw the GPUs of the first node draw, over all attempts; None where it saw none.

    The sum of each GPU's increments between the first and the last sample of each fragment, `MONITOR_EVERY_S` apart: up
    to two intervals of each attempt are missing. A counter that fell was restarted and counts from there.
    """
    path = Ticket.path(stage_root)
    if not path.exists():
        return None
    total: float | None = None
    for fragment in fragments(stage_root, Ticket.read(stage_root).id):
        last: dict[str, float] = {}
        for stats in records(fragment, "stats"):
            for key, value in stats["item"].items():
                if key.startswith("gpu.") and key.endswith(".energyJoules"):
                    total = (total or 0.0) + max(0.0, float(value) - last.get(key, float(value)))
                    last[key] = float(value)
    return total
