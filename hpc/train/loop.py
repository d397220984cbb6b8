"""The one training loop: next-token prediction over packed tokens, for pretraining and for adapters.

A step: read micro-batches by position, forward, loss + balancing loss, backward; all ranks agree whether the step is
good and whether somebody asked to stop; update; log; now and then measure the held-out loss, search for corruption and
checkpoint. A bad step is skipped, or the loop goes back to a checkpoint and on past the bad data (hpc/train/health.py).
The state of the loop is the step number and the health record: data position, learning rate and schedule are functions
of them.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hpc.config import Balance, TrainingBase
from hpc.data.loader import IGNORED, Loader, MicroBatch, Share
from hpc.data.store import TokenStore
from hpc.errors import BudgetSpent, StageError, Stopped
from hpc.evaluate.loss import held_out_loss
from hpc.model.routing import PASSPORT, RouterProbe, load_metrics, passport, router_biases, update_biases
from hpc.run.directory import write_json
from hpc.run.receipt import digest
from hpc.run.task import Context, asked_to_learn
from hpc.tracking.metrics import replayed_steps, value_at
from hpc.train import corruption
from hpc.train.allocator import keep_freed_memory
from hpc.train.checkpoint import Checkpoints, checkpoint_facts
from hpc.train.engine import Engine
from hpc.train.fragments import Rename, Source
from hpc.train.health import RECORD, Guard, Record, StepTimes, agree, clock, nodes_of
from hpc.train.saving import Copy, Write
from hpc.train.schedule import learning_rate
from hpc.train.step_log import StepLog
from hpc.train.watchdog import Watchdog
from hpc.train.written import Written

LEAVE_MARGIN_S = 5.0
"""Seconds before a time limit that are left to the scheduler."""


@dataclass(frozen=True)
class Job:
    """What is trained, on what."""

    model: nn.Module
    settings: TrainingBase
    watchdog: Watchdog
    """Looks on since the stage began."""
    top_k: int
    """Experts per token; 0 for a dense model."""
    balance: Balance
    train_tokens: tuple[Share, ...]
    held_out_tokens: tuple[TokenStore, ...]
    """Of the same sources; the loss is the mean over all their windows, whatever the weights."""
    weights: Source | None = None
    """Where the first weights come from, when the model was built without any."""
    rename: Rename = str
    """From the name of a parameter to that in `weights`; None for one that keeps what it was built with."""
    flops_per_token: float | None = None
    """Model FLOPs of a token, forward and backward, for the MFU that is logged; None where they are not known."""
    restart: Callable[[Engine, int], dict[str, Any]] | None = None
    """Called after the last update of each cycle of the schedule, before its checkpoint, with the engine and the steps
    done; returns figures for the row. It may change weights that are not trained. Collective."""
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
    health: dict[str, Any] = field(default_factory=dict)
    """skipped_steps, rollbacks, peak_memory_bytes, and the ranks' step times over this attempt, for the receipt."""


def train(context: Context, job: Job) -> Trained:
    """Train to the last step, resuming from the newest checkpoint. Collective.

    Raises Stopped after a clean save when any rank was asked to stop, StageError when there are too many bad steps or
    ranks disagree in what must be equal.
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
        context.phase("compile")
        self.engine = Engine(
            job.model,
            settings,
            self.device,
            changes_frozen=job.restart is not None,
            filled_later=job.weights is not None,
        )
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
        self.log = StepLog(context, settings, job.flops_per_token, is_accelerator=self.device == "cuda")
        self.step_seconds: list[float] = []
        self.loss: float | None = None
        self.routing: dict[str, Any] = {}
        self.window: torch.Tensor | None = None
        self.window_from = 0
        self.passport: dict[str, Any] | None = None
        self.watchdog = job.watchdog
        self.guard = Guard(settings.health, settings.optimizer.lr)
        self.nodes = nodes_of(world)
        self.times, self.all_times = StepTimes(self.nodes), StepTimes(self.nodes)
        self.clock = clock(self.device)
        self.spent: str | None = None
        """Why no more energy may be drawn, once that is so."""

    def run(self) -> Trained:
        step = self._resume()
        keep_freed_memory()
        settings, health = self.settings, self.settings.health
        if health.rehearse and step < settings.steps:
            self._rehearse(step)
        self.context.phase("productive")
        if step == 0:
            before = self._evaluate(None) if self.job.measure_before else None
            self._log(0, {"heldout_loss": self._evaluate(settings.evaluate_tokens), "heldout_loss_before": before})
            if health.on_bad_step == "roll_back":
                self._checkpoint(0)
        saved = self.window_from = step
        self.watchdog.enter("step")
        while step < settings.steps:
            began = time.monotonic()
            rate = learning_rate(settings.schedule, settings.optimizer.lr, step, settings.steps)
            stop, problem = self._update(step, rate)
            self.step_seconds.append(time.monotonic() - began)
            done = step + 1
            row = {"loss": self.loss, "lr": rate, "grad_norm": self.engine.gradient_norm, **self.routing}
            if problem and health.on_bad_step == "roll_back":
                step = self._roll_back(done, problem, row)
                continue
            if problem:
                self.guard.skip(done, problem)
                row["skipped"] = problem
            if self.job.restart is not None and self._ends_cycle(done):
                with self.watchdog.section("checkpoint"):
                    row |= self.job.restart(self.engine, done)
            if done % settings.evaluate_every_steps == 0 or done == settings.steps:
                row["heldout_loss"] = self._evaluate(settings.evaluate_tokens)
            if done % health.report_every_steps == 0:
                row |= self.times.report()
                self.times.clear()
            self._log(done, row)
            if health.probe_every_steps and done % health.probe_every_steps == 0:
                self._search(done)
            due = done % settings.checkpoint_every_steps == 0 or done == settings.steps
            if due or stop:
                self._checkpoint(done)
                saved = done
            if stop and done < settings.steps:
                self._published(saved)
                where = f"stopped at step {done} of {settings.steps}, checkpoint at step {saved} is safe"
                if self.spent:
                    raise BudgetSpent(f"{self.spent}; {where}: raise the budget to go on")
                raise Stopped(where)
            step = done
        self._published(saved)
        self.watchdog.enter("finish")
        return self._trained()

    def _ends_cycle(self, done: int) -> bool:
        every = self.settings.schedule.restart_every_steps
        return done == self.settings.steps or (every is not None and done % every == 0)

    def _trained(self) -> Trained:
        self.context.stop.immediately()
        ordered = sorted(self.step_seconds)
        tokens = self.settings.batches.tokens_per_step
        held_out_loss = self._evaluate(None)
        return Trained(
            engine=self.engine,
            held_out_loss_before=value_at(self.context.directory.metrics, 0, "heldout_loss_before"),
            held_out_loss=held_out_loss,
            last_loss=self.loss,
            tokens_per_s=tokens / ordered[len(ordered) // 2] if ordered else None,
            replayed_steps=replayed_steps(self.context.directory.metrics),
            checkpoints=self.checkpoints,
            passport=self.passport,
            health={**self.guard.counts, "peak_memory_bytes": self._peak_memory_bytes(), **self.all_times.report()},
        )

    def _resume(self) -> int:
        found = self.checkpoints.newest()
        self.checkpoints.expect(self.engine.checkpoint_bytes)
        if self.job.weights is not None:  # also before a checkpoint, which holds only what is trained
            self.context.progress("loading the weights")
            self.engine.fill(self.job.weights, self.job.rename)
        if found is None:
            return 0
        folder, step = found
        self.context.progress(f"resuming from step {step}")
        self.context.phase("start")
        self.guard.record = self._load(folder)
        return step

    def _load(self, folder: Path) -> Record:
        """The engine and the passport of a checkpoint; returns what health remembered then."""
        self.engine.load(folder)
        if (folder / PASSPORT).exists():
            self.passport = json.loads((folder / PASSPORT).read_text(encoding="utf-8"))
        return Record.read(folder)

    def _roll_back(self, done: int, problem: str, row: dict[str, Any]) -> int:
        """Return to the newest checkpoint and leave out the data read since; returns its step. Collective."""
        with self.watchdog.section("checkpoint"):
            found = self.checkpoints.newest()
            assert found is not None, "there is one of step 0"
            folder, step = found
            self.guard.leave_out(step, done, problem)
            self._log(done, {**row, "problem": problem, "rolled_back_to": step})
            self.guard.record.losses = self._load(folder).losses
        self.window, self.window_from = None, step
        return step

    def _rehearse(self, step: int) -> None:
        """One forward and backward pass that leaves no trace: what memory does not suffice for fails now. Collective.

        Real tokens, those of the step to come: made-up ones would go to other experts.
        """
        self.context.progress("rehearsing one micro-batch")
        self.context.phase("compile")
        batch = self.loader.micro_batches(self.guard.record.place(step))[0]
        self.engine.rehearse(lambda: self._pass(batch, None))
        self.context.progress(f"rehearsed: {self._peak_memory_bytes() / 2**30:.2f} GiB at most on a rank")

    def _peak_memory_bytes(self) -> int:
        """The most that any rank has held so far. Collective."""
        peak = torch.tensor(float(self.engine.peak_memory_bytes), device=self.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        return int(peak)

    def _search(self, done: int) -> None:
        """Compare the ranks on one micro-batch. Collective; raises StageError when they are not equal."""
        batch = torch.from_numpy(self.loader.micro_batches(self.guard.record.place(done - 1))[0].ids)
        with self.watchdog.section("evaluate"):
            corruption.search(self.engine, batch, done, self.nodes)
        self.probe.discard()

    def _checkpoint(self, done: int) -> None:
        if self.context.world.is_first:
            self.context.check_fence()
        self.context.phase("checkpoint", done)
        with self.watchdog.section("checkpoint"):
            self.checkpoints.save(done, self.context.attempt, self._snapshot(done))
        self.context.phase("productive")

    def _published(self, saved: int) -> None:
        self.context.phase("checkpoint", saved)
        with self.watchdog.section("checkpoint"):
            self.checkpoints.wait()
        self.context.phase("productive")

    def _snapshot(self, done: int) -> Copy:
        """What a checkpoint holds: the engine's state, and where tokens went since the checkpoint before."""
        if self.window is not None:
            self.passport = passport(self.window, self.job.top_k, self.window_from + 1, done)
            self.window, self.window_from = None, done
        told = {RECORD: asdict(self.guard.record), PASSPORT: self.passport} if self.context.world.is_first else {}
        copy = self.engine.snapshot(to_host=self.settings.checkpoint_async)

        def copy_all() -> Write:
            write = copy()

            def write_all(folder: Path) -> list[Written]:
                files = write(folder)
                for name, content in told.items():
                    if content is not None:
                        write_json(folder / name, content)
                        files.append(Written.read(folder / name))
                return files

            return write_all

        return copy_all

    def _update(self, step: int, rate: float) -> tuple[bool, str | None]:
        """One optimizer step; returns whether some rank wants to stop, and why the weights were left as they are."""
        total = torch.zeros((), device=self.device)
        counts: torch.Tensor | None = None
        computed_s = 0.0
        batches = self.loader.micro_batches(self.guard.record.place(step))
        weights = self._weights(batches)
        for number, batch in enumerate(batches):
            began = self.clock()
            loss, counts_LE = self._pass(batch, counts, weights[number])
            computed_s += self.clock() - began
            counts = counts_LE if counts is None else counts + counts_LE
            total += loss
            if number + 1 < len(batches):
                self.engine.step(rate)
            else:
                stop, problem = self._agree(total / len(batches), computed_s)
                self.checkpoints.copied()
                if not self.engine.step(rate, drop=problem is not None):
                    problem = problem or "the gradient norm is not finite"
            self.watchdog.beat()
        assert counts is not None
        if self.probe.routers:
            self._follow(counts, updated=problem is None)
        if problem is None and self.loss is not None:
            self.guard.accept(self.loss)
        return stop, problem

    def _follow(self, counts_LE: torch.Tensor, *, updated: bool) -> None:
        """What a step's routing means for the biases, the row of metrics and the passport."""
        if self.job.balance.bias_update_rate and updated:
            update_biases(self.engine.module, counts_LE, self.job.balance.bias_update_rate)
        biases = router_biases(self.engine.module)
        self.routing = load_metrics(counts_LE.cpu(), biases, self.settings.batches.tokens_per_step, self.job.top_k)
        self.window = counts_LE.cpu() if self.window is None else self.window + counts_LE.cpu()

    def _weights(self, batches: list[MicroBatch]) -> list[float]:
        """Weights of micro-batches whose mean over the step and all ranks is the mean over all targets that count.

        1 where all do. Collective where a source holds conversations.
        """
        if all(share.store.answers is None for share in self.job.train_tokens):
            return [1.0] * len(batches)
        own = [int((batch.targets != IGNORED).sum()) for batch in batches]
        total = torch.tensor(float(sum(own)), device=self.device)
        dist.all_reduce(total)
        mean = max(1.0, float(total)) / (len(batches) * self.context.world.size)
        return [count / mean for count in own]

    def _pass(
        self, batch: MicroBatch, before_LE: torch.Tensor | None, weight: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of a micro-batch; returns its loss and the routers' counts.

        before_LE: counts of the micro-batches before it in this step. weight: of its loss in the step.
        """
        ids = torch.from_numpy(batch.ids)
        positions = None if batch.positions is None else torch.from_numpy(batch.positions)
        loss = weight * self.engine.loss(ids[:, :-1], torch.from_numpy(batch.targets), positions)
        balance = self.job.balance
        heard = self.probe.collect(before_LE if balance.aux_loss_over == "step" else None)
        self.engine.backward(loss + balance.aux_loss * heard.aux_loss + balance.z_loss * heard.z_loss)
        return loss.detach(), heard.counts_LE

    def _agree(self, loss: torch.Tensor, computed_s: float) -> tuple[bool, str | None]:
        """Hear all ranks before the update: whether any was asked to stop, and what speaks against the update."""
        stop = (
            self.context.stop.requested
            or self.context.stop.runs_out(self._seconds_to_leave())
            or self.checkpoints.has_failed  # every rank hears why when the next save begins
        )
        spent = self.context.budget.spent() if self.context.budget else None
        word = agree(loss, computed_s, stop, spent is not None, self.context.world)
        if word.is_spent:
            self.spent = spent or "the energy budget is spent, as rank 0 says"
        self.loss = word.loss if math.isfinite(word.loss) else None
        self.times.add(word.seconds)
        self.all_times.add(word.seconds)
        return word.stop or word.is_spent, self.guard.objection(word)

    def _seconds_to_leave(self) -> float:
        """What another step and a checkpoint may take; a first checkpoint is guessed."""
        return 3 * max(self.step_seconds[-10:], default=0.0) + 2 * (self.checkpoints.seconds or 5.0) + LEAVE_MARGIN_S

    def _evaluate(self, max_tokens: int | None) -> float:
        self.engine.module.eval()

        def told(done: int, total: int) -> None:
            self.watchdog.beat()
            if max_tokens is None:
                self.context.progress("held-out loss", done=done, total=total)

        with self.watchdog.section("evaluate"):
            loss, _ = held_out_loss(
                self.engine.forward,
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
        self.log.row(done, figures, self.step_seconds[-10:], f"training{self.guard.words}", self.loss)


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
