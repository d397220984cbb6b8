"""What a person sees while a chain runs: a live table in a terminal, plain lines elsewhere."""

import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpc.energy.meter import Power, newest_power
from hpc.plan.show import duration, energy
from hpc.run.directory import StageDirectory
from hpc.run.receipt import Receipt
from hpc.run.task import read_progress

PLAIN_EVERY_S = 15.0
"""Seconds between plain lines of a running stage."""


@dataclass
class View:
    """Shows the chain. Every figure comes from the run directory, so it is the same on Slurm."""

    names: list[str]
    console: Console = field(default_factory=lambda: Console(highlight=False))
    _states: dict[str, str] = field(default_factory=dict)
    _live: Live | None = None
    _last_plain: float = 0.0
    _last_text: str = ""

    def __enter__(self) -> "View":
        if self.console.is_terminal:
            self._live = Live(self._table("", {}, None), console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, stage: str, text: str) -> None:
        """A lasting word about a stage: started, reused, done."""
        self._states[stage] = text
        if self._live:
            self._live.update(self._table("", {}, None))
        else:
            print(f"{stage}: {text}", flush=True)

    def update(self, stage: str, directory: StageDirectory, attempt: int) -> None:
        """Show where the running stage is."""
        progress = read_progress(directory)
        if progress.get("attempt") != attempt or progress.get("text") == "done":
            return
        power = newest_power(directory.root, attempt)
        if self._live:
            self._live.update(self._table(stage, progress, power))
            return
        now, text = time.monotonic(), str(progress.get("text"))
        if text != self._last_text or now - self._last_plain >= PLAIN_EVERY_S:
            self._last_plain, self._last_text = now, text
            print(f"{stage}: {describe(progress, power)}", flush=True)

    def _table(self, running: str, progress: dict[str, Any], power: Power | None) -> Table:
        table = Table(box=None, padding=(0, 2), show_header=False)
        for name in self.names:
            if name == running:
                total = progress.get("total")
                bar = ProgressBar(total=total, completed=progress.get("done") or 0, width=24) if total else Text("")
                table.add_row(Text(name, "bold"), bar, describe(progress, power))
            else:
                state = self._states.get(name, "")
                table.add_row(
                    Text(name, "" if state else "dim"), Text(""), Text(state or "waiting", "" if state else "dim")
                )
        return table


def describe(progress: dict[str, Any], power: Power | None) -> str:
    """One line: what, step, loss, speed, power, time left."""
    words = [str(progress.get("text", ""))]
    if progress.get("total"):
        words.append(f"{progress['done']:,}/{progress['total']:,}")
    if progress.get("loss") is not None:
        words.append(f"loss {progress['loss']:.3f}")
    if progress.get("tokens_per_s"):
        words.append(f"{progress['tokens_per_s']:,.0f} tokens/s")
    if power is not None:
        words.append(f"{power.watts:.0f} W{' (estimated)' if power.is_estimated else ''}")
    if progress.get("mb_per_s"):
        words.append(f"{progress['mb_per_s']:,.1f} MB/s")
    if progress.get("seconds_left"):
        words.append(f"{duration(progress['seconds_left'])} left")
    return "  ".join(words)


def result_words(receipt: Receipt) -> str:
    """The figures of a receipt that matter at a glance."""
    words = []
    for key, text in (
        ("tokens_train", "{:,} training tokens"),
        ("unigram_perplexity", "unigram perplexity {:.1f}"),
        ("heldout_perplexity", "held-out perplexity {:.1f}"),
        ("max_abs_logit_difference", "logits differ by {:.1e}"),
        ("bits_per_weight", "{:.1f} bits per weight"),
        ("kl", "KL {:.4f}"),
    ):
        if isinstance(receipt.metrics.get(key), (int, float)):
            words.append(text.format(receipt.metrics[key]))
    words.append(duration(receipt.seconds))
    if receipt.energy.get("energy_j") is not None:
        words.append(energy(receipt.energy["energy_j"]))
    return ", ".join(words)
