"""A stage's life made up step by step, written as the files that a real one leaves, with the true split kept beside.

The truth is kept as chunks of time with a label that later events change: a kill turns the chunks after the last
checkpoint into lost ones. Times are eighths of a second and powers whole watts, so that every joule is exact.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENS_PER_STEP = 512


@dataclass
class Chunk:
    """A stretch of time of one attempt (0: between attempts)."""

    attempt: int
    start: float
    end: float
    label: str
    step: int | None = None


@dataclass
class Life:
    """One stage. Every method lets time pass and writes what a real worker would write."""

    root: Path
    watts: dict[str, int]
    """Power of each node."""
    kind: str = "pretrain"
    now: float = 1000.0
    chunks: list[Chunk] = field(default_factory=list)
    attempt: int = 0
    step: int = 0
    checkpoint: int = 0
    samplers: list[tuple[int, str, float, float]] = field(default_factory=list)
    """(attempt, host, from, to)"""
    _born: float = 0.0

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True)
        self._write("task.json", {"stage": {"kind": self.kind, "needs": []}})

    # Files ----------------------------------------------------------------------------------------------------------

    def _write(self, name: str, value: Any) -> None:
        (self.root / name).write_text(json.dumps(value))

    def row(self, name: str, **values: Any) -> None:
        """Append a row; its time is now unless it is given."""
        with (self.root / name).open("a") as file:
            file.write(json.dumps({**values, "time": values.get("time", self.now)}) + "\n")

    def event(self, event: str, **values: Any) -> None:
        """Append a row to attempts.jsonl."""
        self.row("attempts.jsonl", event=event, **values)

    def phase(self, phase: str, step: int | None = None) -> None:
        """Append a row to timeline.jsonl."""
        self.row("timeline.jsonl", attempt=self.attempt, phase=phase, step=step)

    def passes(self, seconds: float, label: str, step: int | None = None) -> None:
        """Let time pass."""
        inside = self.attempt if label not in ("queue", "between") else 0
        self.chunks.append(Chunk(inside, self.now, self.now + seconds, label.replace("between", "idle"), step))
        self.now += seconds

    # What happens ---------------------------------------------------------------------------------------------------

    def begin(self, start_s: float, compile_s: float, *, on_slurm: bool = True, resume_from: int | None = None) -> None:
        """A new attempt, up to its first step; it goes on from the newest checkpoint, or an older one."""
        self.attempt += 1
        self.throw_after(self.checkpoint if resume_from is None else resume_from)
        self.step = self.checkpoint if resume_from is None else resume_from
        nodes = list(self.watts) if on_slurm else []
        self.event("start", attempt=self.attempt, host=next(iter(self.watts)), ranks=len(self.watts), token="t",
                   job="7" if on_slurm else "", restart=0, nodes=nodes, checkpoint=self.checkpoint)  # fmt: skip
        if resume_from is not None:
            self._forget_checkpoints(resume_from)
        self._born = self.now
        self.passes(start_s, "start")
        if self.kind == "pretrain":
            self.phase("compile")
            self.passes(compile_s, "compile")
        self.phase("productive")
        if self.kind == "pretrain" and self.step == 0:
            self.passes(0.5, "productive", 0)
            self._log(0)

    def _log(self, step: int, **more: Any) -> None:
        self.row("metrics.jsonl", step=step, attempt=self.attempt, tokens=step * TOKENS_PER_STEP, loss=1.0, **more)

    def do_step(self, seconds: float) -> None:
        """A step that is logged."""
        self.step += 1
        self.passes(seconds, "productive", self.step)
        self._log(self.step)

    def save(self, seconds: float) -> None:
        """Training stands still for a checkpoint, which is published."""
        self.phase("checkpoint", self.step)
        self.passes(seconds, "checkpoint", self.step)
        self.phase("productive")
        self._forget_checkpoints(self.step)
        (self.root / "checkpoints" / f"step-{self.step:08d}").mkdir(parents=True)

    def _forget_checkpoints(self, step: int) -> None:
        """From now on the newest one is that of `step`; others are deleted, or were found damaged."""
        self.checkpoint = step
        for old in (self.root / "checkpoints").glob("*"):
            old.rmdir()

    def roll_back(self, seconds: float) -> None:
        """A bad step; what was done since the newest checkpoint is thrown away within the attempt."""
        self.passes(seconds, "productive", self.step + 1)
        self.row("metrics.jsonl", step=self.step + 1, attempt=self.attempt, tokens=0, loss=None,
                 rolled_back_to=self.checkpoint, problem="a spike")  # fmt: skip
        for chunk in self.chunks:
            if chunk.attempt == self.attempt and chunk.step is not None and chunk.step > self.checkpoint:
                chunk.label = "replay"
        self.step = self.checkpoint

    def throw_after(self, step: int) -> None:
        """What attempts did after that step's checkpoint did not stay."""
        for number in {chunk.attempt for chunk in self.chunks} - {0}:
            mine = [chunk for chunk in self.chunks if chunk.attempt == number and chunk.label != "replay"]
            places = [i for i, c in enumerate(mine) if c.step is not None and 0 < c.step <= step]
            for chunk in mine[(places[-1] + 1 if places else 0) :]:
                is_step = chunk.label == "productive" and chunk.step is not None
                chunk.label = "replay" if is_step else "lost"

    def end(self, tail_s: float, outcome: str | None, *, silent: str | None = None, has_end: bool = True) -> None:
        """The attempt ends after a while in which nothing is done: with a record (`outcome`) or without a word.

        silent: a node whose samples end before that while. has_end: whether samplers write their last line.
        """
        died = self.now
        self.passes(tail_s, "idle" if outcome == "done" else "lost" if outcome or has_end else "productive")
        for host, watts in self.watts.items():
            self._sample(host, watts, died if host == silent else self.now, has_end=has_end and host != silent)
        if outcome:
            message = "" if outcome == "done" else f"it {outcome}"
            self.event("end", attempt=self.attempt, rank=0, outcome=outcome, exit_code=0, message=message,
                       is_crash=False, node="")  # fmt: skip

    def finish(self, tail_s: float = 0.25) -> None:
        """The receipt, and the end."""
        receipt = {"stage": self.root.name, "kind": self.kind, "config": {}, "inputs": {}, "files": [], "metrics": {},
                   "provenance": {}, "energy": {}, "code": {}, "seconds": 1.0, "attempts": self.attempt}  # fmt: skip
        self._write("receipt.json", receipt)
        for chunk in self.chunks:
            if chunk.attempt == self.attempt and chunk.label == "lost":
                chunk.label = "productive"
        self.phase("idle")
        self.end(tail_s, "done")

    def _sample(self, host: str, watts: int, until: float, *, has_end: bool) -> None:
        begin = min(self._born + 0.125, until)
        self.samplers.append((self.attempt, host, begin, until))
        name = f"energy-{host}.jsonl"
        self.row(name, event="start", attempt=self.attempt, host=host, time=begin,
                 counters=[{"name": "meter", "provenance": "measured: made up"}])  # fmt: skip
        seconds = 0.0
        while begin + seconds < until:
            self._one_sample(name, begin, seconds, watts, "sample")
            seconds += 1.0
        self._one_sample(name, begin, until - begin, watts, "end" if has_end else "sample")

    def _one_sample(self, name: str, begin: float, seconds: float, watts: int, event: str) -> None:
        joules = watts * seconds
        self.row(name, event=event, attempt=self.attempt, time=begin + seconds, energy_j={"meter": joules},
                 power_w={"meter": watts}, total_energy_j=joules, total_power_w=watts)  # fmt: skip

    # The truth ------------------------------------------------------------------------------------------------------

    def seconds(self, label: str) -> float:
        """Wall seconds of a label."""
        return sum(chunk.end - chunk.start for chunk in self.chunks if chunk.label == label)

    def joules(self, *labels: str) -> float:
        """Joules drawn in chunks of these labels, all of them without any, where a sampler was looking."""
        total = 0.0
        for chunk in self.chunks:
            if labels and chunk.label not in labels:
                continue
            for attempt, host, begin, until in self.samplers:
                if attempt == chunk.attempt:
                    overlap = min(chunk.end, until) - max(chunk.start, begin)
                    total += max(0.0, overlap) * self.watts[host]
        return total

    def dropped_steps(self) -> int:
        """Steps whose work did not stay."""
        return sum(chunk.label == "replay" and chunk.step != 0 for chunk in self.chunks)
