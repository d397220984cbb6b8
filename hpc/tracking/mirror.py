"""The mirror of a stage in W&B: a process of its own that reads the stage's files and nothing else.

Rank 0 starts one per attempt and says at its end how the attempt ended. So training never waits for W&B: not for its
imports, not for a server that is slow, hangs or is gone; and what is shown is a function of files, with three effects:

* the run of a requeued stage goes on where it ended: the new attempt's mirror first sends what the earlier ones could
  not, because a kill came within their flush interval or the server was away;
* a trainer that is killed has its last rows sent all the same, unless its node died with it;
* `launch.py sync` sends what is left by the same code, from a login node.

A server that does not answer at the start makes the attempt write offline. `finish` waits for a bounded time.

    python -m hpc.tracking.mirror STAGE --attempt N --parent PID     while an attempt runs; its outcome comes on stdin
    python -m hpc.tracking.mirror STAGE --once SCRATCH               what is there, online, then the edges
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil

from hpc.energy.goodput import stage_goodput
from hpc.energy.meter import is_sampled
from hpc.run.attempts import Fence, attempt_ends
from hpc.run.directory import StageDirectory, read_jsonl, write_json
from hpc.run.receipt import Receipt, read_receipt
from hpc.tracking import wandb
from hpc.tracking.rows import flatten, rows_of
from hpc.tracking.ticket import Ticket

Outcome = Literal["done", "stopped", "failed"]
POLL_S = 0.5
LOCK_TIMEOUT_S = 20.0
"""How long a new attempt's mirror lets the one of a killed attempt finish."""
GOODPUT_BYTES = 64 * 2**20
"""Goodput is told where the samples it is computed from can be read in a second or two; the report always has it."""
FINISH_ONLINE_S, FINISH_OFFLINE_S = 15.0, 60.0
"""Longest wait of a stage for its mirror at the end. Offline there is nothing to wait for but this machine."""


class Mirror:
    """The trainer's end: starts the process and ends it."""

    def __init__(self, process: "subprocess.Popen[bytes] | None" = None, timeout_s: float = 0.0) -> None:
        self._process, self._timeout_s = process, timeout_s

    @classmethod
    def start(cls, ticket: Ticket, stage_root: Path, attempt: int) -> "Mirror":
        """Start mirroring; returns at once. Whatever goes wrong is told in wandb/mirror.log and harms nobody."""
        ticket.write(stage_root)
        command = [sys.executable, "-m", "hpc.tracking.mirror", str(stage_root), "--attempt", str(attempt),
                   "--parent", str(os.getpid())]  # fmt: skip
        with (stage_root / "wandb" / "mirror.log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
        return cls(process, FINISH_ONLINE_S if ticket.mode == "online" else FINISH_OFFLINE_S)

    def finish(self, outcome: Outcome) -> None:
        """Say how the attempt ended and wait, for a bounded time, until that is sent."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.communicate(outcome.encode(), self._timeout_s)
        except (subprocess.TimeoutExpired, OSError):
            end(process)
        if process.returncode:
            print("wandb: not everything was sent; `python launch.py sync RUN` sends the rest", flush=True)


def end(process: "subprocess.Popen[Any]") -> None:
    """End a mirror and what it started; nothing where it has ended."""
    if process.poll() is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def follow(stage_root: Path, attempt: int, parent: int) -> None:
    """Mirror an attempt until it is over."""
    for caught in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(caught, signal.SIG_IGN)  # the trainer hears them too; this process ends after it
    os.nice(10)
    heard: list[str] = []
    ear = threading.Thread(target=lambda: heard.append(sys.stdin.read()), daemon=True)
    ear.start()
    directory, ticket = StageDirectory(stage_root), Ticket.read(stage_root)
    fence = Fence(directory, attempt)
    with _alone(stage_root):
        writer = _open(ticket, stage_root, parent)
        writer.configure(_facts(directory))
        rows = rows_of(stage_root, ticket.has_steps)
        while not fence.is_superseded():
            is_over = not ear.is_alive() or os.getppid() != parent
            for number, row in rows.new(is_over=is_over):
                writer.log(number, row)
            if is_over:
                break
            time.sleep(POLL_S)
        outcome = heard[0] if heard and heard[0] else "lost"
        _close(writer, directory, {"attempt": attempt, "outcome": outcome})


def _open(ticket: Ticket, stage_root: Path, pid: int) -> wandb.Writer:
    """The run, online if that is asked for and possible."""
    if ticket.mode == "online":
        why: object = wandb.unreachable()
        if why is None:
            try:
                return wandb.Writer.open(ticket, stage_root, "online", pid=pid)
            except Exception as error:  # W&B must never end a stage
                why = error
        print(f"{wandb.server()}: {why}; going on offline, `launch.py sync` sends it later", flush=True)
    return wandb.Writer.open(ticket, stage_root, "offline", pid=pid)


def once(stage_root: Path, scratch: Path) -> None:
    """Send what the server lacks, then the edges; write wandb/sent.json. Prints what was sent as JSON.

    scratch: where W&B puts its own files, which are of no use afterwards.
    """
    directory, ticket = StageDirectory(stage_root), Ticket.read(stage_root)
    receipt = read_receipt(directory)
    sent, is_over = 0, not is_running(stage_root)
    writer = wandb.Writer.open(ticket, scratch, "online", is_over=is_over)
    rows = rows_of(stage_root, ticket.has_steps)
    for number, row in rows.new(is_over=is_over):
        sent += number >= writer.first
        writer.log(number, row)
    _close(writer, directory, None)
    state = {"server": wandb.server(), "rows": rows.count, "receipt": receipt.digest if receipt else None}
    write_json(sent_path(stage_root), {**state, "edges": False})
    made, used = edges(ticket, stage_root, receipt)
    if made:
        writer = wandb.Writer.open(ticket, scratch, "online")
        writer.add_edges(made, used)
        writer.finish(0)
    write_json(sent_path(stage_root), {**state, "edges": True})
    print(json.dumps({"sent": sent, "rows": rows.count, "edges": len(used) + bool(made)}), flush=True)


Edge = tuple[str, str, Path]


def edges(ticket: Ticket, stage_root: Path, receipt: Receipt | None) -> tuple[Edge | None, list[Edge]]:
    """What a finished stage made and what it read, as (name, type, receipt.json); inputs that were made again since are
    left out."""
    if receipt is None:
        return None, []
    used = []
    for name, digest in receipt.inputs.items():
        directory = StageDirectory(stage_root.parent / name)
        theirs = read_receipt(directory)
        if theirs is not None and theirs.digest == digest and Ticket.path(directory.root).exists():
            used.append((f"{ticket.group}-{name}", Ticket.read(directory.root).produces, directory.receipt))
    return (f"{ticket.group}-{receipt.stage}", ticket.produces, StageDirectory(stage_root).receipt), used


def sent_path(stage_root: Path) -> Path:
    """What the last complete sync sent: rows, the receipt's digest, whether edges were added, and to which server."""
    return stage_root / "wandb" / "sent.json"


def _close(writer: wandb.Writer, directory: StageDirectory, this: dict[str, Any] | None) -> None:
    writer.configure(_facts(directory, this))
    receipt = read_receipt(directory)
    if receipt is not None:
        writer.summarize(flatten(final_figures(directory, receipt)))
    writer.finish(0 if receipt is not None else 1)


def final_figures(directory: StageDirectory, receipt: Receipt) -> dict[str, Any]:
    """The receipt's metrics, and what all attempts cost in energy and time."""
    joules, size = (
        receipt.energy["energy_j"],
        sum(path.stat().st_size for path in directory.root.glob("energy-*.jsonl")),
    )
    goodput = stage_goodput(directory.root) if size < GOODPUT_BYTES else None
    return {
        **receipt.metrics,
        "energy_j": joules,
        "energy_kwh": None if joules is None else joules / 3.6e6,
        "lost_j": receipt.energy.get("lost_j"),
        "seconds": receipt.seconds,
        "attempts": receipt.attempts,
        "goodput": goodput.goodput if goodput else None,
        "goodput_s": goodput.seconds if goodput else None,
    }


def _facts(directory: StageDirectory, this: dict[str, Any] | None = None) -> dict[str, Any]:
    """What becomes known while a stage runs: its attempts, and whether its joules are measured or estimated."""
    sources = {
        path.stem.removeprefix("energy-"): provenance(path) for path in sorted(directory.root.glob("energy-*.jsonl"))
    }
    kinds = sorted({source.split(":")[0] for each in sources.values() for source in each})
    return {"attempts": attempts(directory, this), "energy": {"is": " and ".join(kinds) or None, "sources": sources}}


def provenance(samples: Path) -> list[str]:
    """What the counters of a node are, as its sampler said in its first line; files of long stages are large."""
    with samples.open(encoding="utf-8") as file:
        try:
            return sorted({counter["provenance"] for counter in json.loads(file.readline()).get("counters", [])})
        except ValueError:
            return []


def attempts(directory: StageDirectory, this: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Every attempt: number, start and end (unix s), outcome, nodes, ranks and the checkpoint it began from.

    An attempt that a newer one follows and that left no word is 'lost'. this: outcome of the one that is ending.
    """
    starts = [row for row in read_jsonl(directory.attempts) if row.get("event") == "start"]
    told = []
    for row in starts:
        ends = attempt_ends(directory, row["attempt"])
        is_last = row is starts[-1]
        outcome = ends[0]["outcome"] if ends else "running" if is_last else "lost"
        end_s = ends[-1]["time"] if ends else None
        if this is not None and this["attempt"] == row["attempt"]:
            outcome, end_s = (outcome if ends else this["outcome"]), end_s or time.time()
        told.append(
            {"attempt": row["attempt"], "start": row["time"], "end": end_s, "outcome": outcome, "ranks": row["ranks"],
             "nodes": list(row.get("nodes") or [row["host"]]), "checkpoint": row["checkpoint"]}
        )  # fmt: skip
    return told


def is_running(stage_root: Path) -> bool:
    """Whether the stage's last attempt is at work: without a scheduler, as its samplers tell."""
    return is_sampled(stage_root) and not StageDirectory(stage_root).receipt.exists()


@contextlib.contextmanager
def _alone(stage_root: Path) -> Iterator[None]:
    """Let the mirror of an attempt that was killed finish first. Where files cannot be locked, or it takes too long, go
    on: it is fenced by the new attempt's number and stops by itself."""
    with (stage_root / "wandb" / ".lock").open("a") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        yield


def main() -> None:
    """One of the two modes above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path)
    parser.add_argument("--attempt", type=int)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--once", type=Path, metavar="SCRATCH")
    options = parser.parse_args()
    if options.once:
        once(options.stage, options.once)
    else:
        follow(options.stage, options.attempt, options.parent)


if __name__ == "__main__":
    main()
