"""The one training loop: next-token prediction over packed tokens, for pretraining and for adapters.

A step: read micro-batches by position, forward, loss + balancing loss, backward; all ranks agree that the loss is
finite and whether somebody asked to stop; update; log; now and then measure the held-out loss and checkpoint.
The state of the loop is the step number: data position, learning rate and schedule are functions of it.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hpc.config import TrainingBase
from hpc.data.loader import Loader, Share
from hpc.data.store import TokenStore
from hpc.energy.meter import EnergyMeter
from hpc.errors import StageError, Stopped
from hpc.evaluate.loss import held_out_loss, token_losses
from hpc.model.routing import PASSPORT, RouterProbe, load_metrics, passport, router_biases, update_biases
from hpc.run.directory import write_json
from hpc.run.receipt import digest
from hpc.run.task import Context, asked_to_learn
from hpc.tracking.metrics import Metrics, history, replayed_steps
from hpc.train.checkpoint import Checkpoints, checkpoint_facts
from hpc.train.engine import Engine
from hpc.train.saving import Copy, Write
from hpc.train.schedule import learning_rate
from hpc.train.written import Written

LEAVE_MARGIN_S = 5.0
"""Seconds before a time limit that are left to the scheduler."""


@dataclass(frozen=True)
class Job:
    """What is trained, on what."""

    model: nn.Module
    settings: TrainingBase
    top_k: int
    aux_loss: float
    train_tokens: tuple[Share, ...]
    held_out_tokens: tuple[TokenStore, ...]
    """Of the same sources; the loss is the mean over all their windows, whatever the weights."""
    z_loss: float = 0.0
    balance_over_step: bool = False
    """Whether the balancing loss sees the counts of the whole step so far, not of one micro-batch."""
    bias_update_rate: float = 0.0
    """Step of the routers' biases after each update; 0 leaves them alone."""
    measure_before: bool = False
    """Whether the held-out loss over all tokens is measured before the first step, to compare with the last one."""


@dataclass(frozen=True)
class Trained:
    """What training ended with."""

    engine: Engine
    held_out_loss_before: float | None
    """Before the first update of the first attempt, over all held-out tokens; None unless asked for."""
    held_out_loss: float
    """After the last update, over all held-out tokens."""
    last_loss: float | None
    tokens_per_s: float | None
    """Median over this attempt's steps; None when the attempt did none."""
    replayed_steps: int
    checkpoints: Checkpoints
    passport: dict[str, Any] | None
    """Where tokens went between the last two checkpoints."""


def train(context: Context, job: Job) -> Trained:
    """Train to the last step, resuming from the newest checkpoint. Collective.

    Raises Stopped after a clean save when any rank was asked to stop, StageError when the loss is not finite.
    """
    loop = _Loop(context, job)
    try:
        return loop.run()
    except BaseException:
        loop.checkpoints.settle()
        raise


class _Loop:
    def __init__(self, context: Context, job: Job) -> None:
        self.context, self.job, self.settings = context, job, job.settings
        context.stop.deferred = True
        world, settings = context.world, job.settings
        self.device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        context.progress("building the engine")
        self.engine = Engine(job.model, settings, self.device)
        self.probe = RouterProbe(self.engine.module)
        self.loader = Loader(
            job.train_tokens,
            settings.batches.seq_len,
            settings.batches.micro_batch_size,
            settings.gradient_accumulation_steps,
            world.rank,
            world.size,
            context.task.seed,
            settings.batches.document_masking,
        )
        origin = {
            "stage": digest(asked_to_learn(context.task.stage, context.task.seed)),
            **context.input_files("tokens"),
            "inputs": digest(context.task.inputs),
        }
        self.checkpoints = Checkpoints(
            context.directory.checkpoints,
            world,
            origin,
            keep=settings.keep_checkpoints,
            keep_every=settings.keep_every_steps,
            in_background=settings.checkpoint_async,
            facts=checkpoint_facts(settings),
            check_fence=context.check_fence,
        )
        self.metrics = Metrics(context.directory.metrics, context.mirror) if world.is_first else None
        self.meter = EnergyMeter(context.directory.root, context.attempt)
        self.step_seconds: list[float] = []
        self.loss: float | None = None
        self.routing: dict[str, Any] = {}
        self.window: torch.Tensor | None = None
        self.window_from = 0
        self.passport: dict[str, Any] | None = None

    def run(self) -> Trained:
        start = self._resume()
        settings = self.settings
        if start == 0:
            before = self._evaluate(None) if self.job.measure_before else None
            self._log(0, {"heldout_loss": self._evaluate(settings.evaluate_tokens), "heldout_loss_before": before})
        saved = self.window_from = start
        for step in range(start, settings.steps):
            began = time.monotonic()
            rate = learning_rate(settings.schedule, settings.optimizer.lr, step, settings.steps)
            stop = self._update(step, rate)
            self.step_seconds.append(time.monotonic() - began)
            done = step + 1
            row = {"loss": self.loss, "lr": rate, "grad_norm": self.engine.gradient_norm, **self.routing}
            if done % settings.evaluate_every_steps == 0 or done == settings.steps:
                row["heldout_loss"] = self._evaluate(settings.evaluate_tokens)
            self._log(done, row)
            due = done % settings.checkpoint_every_steps == 0 or done == settings.steps
            if due or stop:
                if self.context.world.is_first:
                    self.context.check_fence()
                self.checkpoints.save(done, self.context.attempt, self._snapshot(done))
                saved = done
            if stop and done < settings.steps:
                self.checkpoints.wait()
                raise Stopped(f"stopped at step {done} of {settings.steps}, checkpoint at step {saved} is safe")
        self.checkpoints.wait()
        self.context.stop.immediately()
        ordered = sorted(self.step_seconds)
        return Trained(
            engine=self.engine,
            held_out_loss_before=self._held_out_loss_before(),
            held_out_loss=self._evaluate(None),
            last_loss=self.loss,
            tokens_per_s=settings.batches.tokens_per_step / ordered[len(ordered) // 2] if ordered else None,
            replayed_steps=replayed_steps(self.context.directory.metrics),
            checkpoints=self.checkpoints,
            passport=self.passport,
        )

    def _resume(self) -> int:
        found = self.checkpoints.newest()
        self.checkpoints.expect(self.engine.checkpoint_bytes)
        if found is None:
            return 0
        folder, step = found
        self.context.progress(f"resuming from step {step}")
        self.engine.load(folder)
        if (folder / PASSPORT).exists():
            self.passport = json.loads((folder / PASSPORT).read_text(encoding="utf-8"))
        return step

    def _snapshot(self, done: int) -> Copy:
        """What a checkpoint holds: the engine's state, and where tokens went since the checkpoint before."""
        if self.window is not None:
            self.passport = passport(self.window, self.job.top_k, self.window_from + 1, done)
            self.window, self.window_from = None, done
        told = self.passport if self.context.world.is_first else None
        copy = self.engine.snapshot(to_host=self.settings.checkpoint_async)

        def copy_all() -> Write:
            write = copy()

            def write_all(folder: Path) -> list[Written]:
                files = write(folder)
                if told is not None:
                    write_json(folder / PASSPORT, told)
                    files.append(Written.read(folder / PASSPORT))
                return files

            return write_all

        return copy_all

    def _update(self, step: int, rate: float) -> bool:
        """One optimizer step; returns whether some rank wants to stop."""
        total = torch.zeros((), device=self.device)
        counts: torch.Tensor | None = None
        batches = self.loader.micro_batches(step)
        for number, batch in enumerate(batches):
            ids = torch.from_numpy(batch.ids)
            loss = token_losses(self.engine.forward(ids[:, :-1]), ids[:, 1:]).mean()
            heard = self.probe.collect(counts if self.job.balance_over_step else None)
            counts = heard.counts_LE if counts is None else counts + heard.counts_LE
            total += loss.detach()
            self.engine.backward(loss + self.job.aux_loss * heard.aux_loss + self.job.z_loss * heard.z_loss)
            if number + 1 == len(batches):
                stop = self._agree(total / len(batches), step)
                self.checkpoints.copied()
            self.engine.step(rate)
        assert counts is not None
        if self.job.bias_update_rate:
            update_biases(self.engine.module, counts, self.job.bias_update_rate)
        biases = router_biases(self.engine.module)
        self.routing = load_metrics(counts.cpu(), biases, self.settings.batches.tokens_per_step, self.job.top_k)
        self.window = counts.cpu() if self.window is None else self.window + counts.cpu()
        return stop

    def _agree(self, loss: torch.Tensor, step: int) -> bool:
        """Mean loss over ranks, checked by all before the update; whether any rank was asked to stop."""
        stop = float(
            self.context.stop.requested
            or self.context.stop.runs_out(self._seconds_to_leave())
            or self.checkpoints.has_failed  # every rank hears why when the next save begins
        )
        word = torch.stack([loss, torch.tensor(stop, device=self.device)])
        dist.all_reduce(word)
        self.loss = float(word[0]) / self.context.world.size
        if not math.isfinite(self.loss):
            raise StageError(
                f"the loss of step {step + 1} is not finite: lower train.optimizer.lr = {self.settings.optimizer.lr}; "
                "the checkpoints before it are intact"
            )
        return bool(word[1] > 0)

    def _seconds_to_leave(self) -> float:
        """What another step and a checkpoint may take; a first checkpoint is guessed."""
        return 3 * max(self.step_seconds[-10:], default=0.0) + 2 * (self.checkpoints.seconds or 5.0) + LEAVE_MARGIN_S

    def _evaluate(self, max_tokens: int | None) -> float:
        self.engine.module.eval()

        def told(done: int, total: int) -> None:
            if max_tokens is None:
                self.context.progress("held-out loss", done=done, total=total)

        loss, _ = held_out_loss(
            lambda ids, positions: self.engine.forward(ids),
            self.job.held_out_tokens,
            seq_len=self.settings.batches.seq_len,
            document_masking=self.settings.batches.document_masking,
            batch_size=self.settings.batches.micro_batch_size,
            max_tokens=max_tokens,
            rank=self.context.world.rank,
            world_size=self.context.world.size,
            progress=told,
        )
        self.engine.module.train()
        self.probe.discard()
        return loss

    def _log(self, done: int, figures: dict[str, Any]) -> None:
        if self.metrics is None:
            return
        self.context.check_fence()
        recent = self.step_seconds[-10:]
        speed = self.settings.batches.tokens_per_step * len(recent) / sum(recent) if recent else None
        energy = self.meter.read()
        row = {
            "step": done,
            "tokens": done * self.settings.batches.tokens_per_step,
            "attempt": self.context.attempt,
            "time": time.time(),
            **figures,
            "tokens_per_s": speed,
            "node_power_w": energy.power_w_by_host,
            "energy_j": energy.energy_j,
        }
        self.metrics.log(row)
        left = (self.settings.steps - done) * sum(recent) / len(recent) if recent else None
        self.context.progress(
            "training", done=done, total=self.settings.steps, loss=self.loss, tokens_per_s=speed, seconds_left=left
        )

    def _held_out_loss_before(self) -> float | None:
        """From the file: the attempt that measured it may have been another one."""
        rows = history(self.context.directory.metrics)
        return next((row.get("heldout_loss_before") for row in rows if row["step"] == 0), None)


def on_first_rank(world_is_first: bool, action: Callable[[], Any]) -> Any:
    """Do something on rank 0 while the others wait. Collective; an error on rank 0 ends all of them."""
    result: Any = None
    error: BaseException | None = None
    if world_is_first:
        try:
            result = action()
        except Exception as caught:
            error = caught
    failed = [error is not None]
    dist.broadcast_object_list(failed, src=0)
    if error is not None:
        raise error
    if failed[0]:
        raise StageError("rank 0 failed while the others waited; its own message says why")
    return result
