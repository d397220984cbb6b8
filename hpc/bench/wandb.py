"""`bench wandb`: what W&B costs a training step, whether its server is well, away or hanging.

Four trainers with the real engine take turns, each logging a row per step with routing of 4 layers of 8 experts: W&B
disabled, offline, online with a server that is well, and online with one that was well at the start and then stopped
answering. While a trainer waits for its turn, the processes of its mirror are stopped too, so that what they take is
counted where it belongs. Each round gives one ratio to `disabled`; the median over rounds is shown. The order changes
with the round. Both servers are on this machine (hpc/bench/wandb_server.py).
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from hpc.bench.peers import Case
from hpc.bench.turns import Clock, Side, Turns, serve
from hpc.bench.wandb_server import Server
from hpc.config.train import Training
from hpc.run.attempts import Job, record_start
from hpc.run.directory import StageDirectory, append_jsonl
from hpc.run.task import World
from hpc.tracking.mirror import Mirror
from hpc.tracking.ticket import Ticket
from hpc.tracking.wandb import rows_on_disk

LIMIT = 1.01
STEPS, WARM_UP_S = 20, 12.0
"""Steps of a turn; seconds of steps before the first round, in which mirrors start and the servers are well."""
SETTINGS: dict[str, Any] = {
    "model": {"hidden_size": 128, "num_layers": 4, "num_attention_heads": 4, "expert_size": 128},
    "router": {"num_experts": 8, "top_k": 2, "aux_loss": 0.01},
    "batches": {"seq_len": 128, "micro_batch_size": 4, "tokens_per_step": 512},
    "steps": 100000,
    "optimizer": {"lr": 1e-4},
}
MODES = ("disabled", "offline", "online", "hanging")


@dataclass(frozen=True)
class Tracked:
    """A trainer and how it is mirrored."""

    root: Path
    mode: str
    environment: dict[str, str]

    @property
    def ticket(self) -> Ticket:
        """Of its W&B run."""
        mode = "offline" if self.mode == "offline" else "online"
        return Ticket(id=f"bench-{self.mode}", project="bench", entity=None, group="bench", name=self.mode,
                      kind="bench", produces="nothing", has_steps=True, mode=mode, config={})  # fmt: skip


def trainer(turns: Turns, case: Tracked) -> None:
    """A training loop that logs each step, as hpc/train does."""
    import torch

    from hpc.model.routing import RouterProbe, load_metrics
    from hpc.train.engine import Engine, start_process_group

    os.environ.update(case.environment)
    start_process_group(World(), "cpu")
    settings = Training.model_validate(SETTINGS)
    model = Case(settings, 1024, 1)
    engine = Engine(model.model(), settings, "cpu")
    probe = RouterProbe(engine.module)
    attempt = record_start(StageDirectory(case.root), Job("bench"), 1, "", 0).number
    if case.mode != "disabled":
        Mirror.start(case.ticket, case.root, attempt)
    turns.start()
    for number, step in enumerate(model.steps()):
        counts = torch.zeros(settings.model.num_layers, settings.router.num_experts)
        for ids, targets in step:
            loss = engine.loss(ids, targets)
            heard = probe.collect()
            engine.backward(loss + settings.router.aux_loss * heard.aux_loss)
            engine.step(settings.optimizer.lr)
            counts += heard.counts_LE
        routing = load_metrics(counts, {}, settings.batches.tokens_per_step, settings.router.top_k)
        row = {"step": number, "tokens": number * 512, "attempt": attempt, "time": time.time(), "loss": float(loss)}
        append_jsonl(case.root / "metrics.jsonl", {**row, **routing, "node_power_w": {"n1": 1.0}, "energy_j": 1.0})
        turns.step(float(loss))


def bench(
    environment: dict[str, str], rounds: int, steps: int, clock: Clock, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Run everything; returns what --json prints."""
    serve(["hpc.bench.peers"], {**environment, "OMP_NUM_THREADS": "1", "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"})
    with tempfile.TemporaryDirectory() as place, Server() as well, Server() as ill:
        servers = {"online": well, "hanging": ill}
        sides: dict[str, Side] = {}
        try:
            for mode in MODES:
                root = Path(place, mode)
                root.mkdir()
                where = servers[mode].environment if mode in servers else {}
                sides[mode] = Side(trainer, Tracked(root, mode, where), 1, clock)
                _warm_up(sides[mode])
            ill.mood = "hang"
            seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
            for number in range(rounds):
                for mode in MODES[number % 4 :] + MODES[: number % 4]:
                    seconds[mode].append(_turn(sides[mode], steps).seconds / steps)
            shown = {mode: len(server.runs[f"bench-{mode}"].history) for mode, server in servers.items()}
            shown["offline"] = rows_on_disk(Path(place, "offline"), "bench-offline")
        finally:
            for side in sides.values():
                _end(side)
    return _told(seconds, shown, clock, tell)


def _told(
    seconds: dict[str, list[float]], shown: dict[str, int], clock: Clock, tell: Callable[[str], None]
) -> dict[str, Any]:
    ratios = {
        mode: median(theirs / plain for theirs, plain in zip(seconds[mode], seconds["disabled"], strict=True))
        for mode in MODES
    }
    tell(f"median of {len(seconds['disabled'])} rounds, {clock} seconds; ratio to disabled, limit {LIMIT}")
    tell(f"{'W&B':<10} {'step, ms':>9} {'ratio':>7} {'rows mirrored':>14}")
    for mode in MODES:
        rows = shown.get(mode, "")
        tell(f"{mode:<10} {median(seconds[mode]) * 1e3:>9.2f} {ratios[mode]:>7.4f} {rows:>14}")
    missing = [mode for mode, rows in shown.items() if not rows]
    if missing:
        tell(f"nothing was mirrored {' and '.join(missing)}: those ratios say nothing")
    return {
        "limit": LIMIT,
        "ratios": ratios,
        "worst_ratio": max(ratios.values()),
        "within_limit": max(ratios.values()) <= LIMIT and not missing,
        "median_step_s": {mode: median(values) for mode, values in seconds.items()},
        "rows_mirrored": shown,
        "clock": clock,
    }


def _warm_up(side: Side) -> None:
    """Steps until the mirror has started and sent rows; then it waits like its trainer."""
    deadline = time.monotonic() + WARM_UP_S
    while time.monotonic() < deadline:
        side.turn(STEPS)
    _signal(side, "suspend")


def _turn(side: Side, steps: int) -> Any:
    _signal(side, "resume")
    try:
        return side.turn(steps)
    finally:
        _signal(side, "suspend")


def _signal(side: Side, what: str) -> None:
    """To all processes of a mirror, but not to the trainer, which waits by itself."""
    for pid in side.pids:
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(child, what)()


def _end(side: Side) -> None:
    """End a side and its mirror, stopped or not."""
    _signal(side, "kill")
    side.close()
