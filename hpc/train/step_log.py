"""What a training stage tells after a step: a row of metrics.jsonl with speed and energy, and the live view's line."""

import time
from typing import Any

from hpc.config import TrainingBase
from hpc.energy.meter import EnergyMeter
from hpc.plan.flops import model_flops_utilization
from hpc.run.directory import append_jsonl
from hpc.run.task import Context


class StepLog:
    """Rows and progress of one attempt; does nothing on ranks other than the first."""

    def __init__(
        self, context: Context, settings: TrainingBase, flops_per_token: float | None, *, is_accelerator: bool
    ) -> None:
        self._context, self._settings, self._flops_per_token = context, settings, flops_per_token
        self._is_accelerator = is_accelerator
        self._meter = EnergyMeter(context.directory.root, context.attempt)

    def row(self, done: int, figures: dict[str, Any], recent_s: list[float], text: str, loss: float | None) -> None:
        """Tell of the step that made `done` updates. recent_s: seconds of the last steps; text: for the live view.

        Raises Fenced when a newer attempt has taken over.
        """
        if not self._context.world.is_first:
            return
        self._context.check_fence()
        tokens, steps = self._settings.batches.tokens_per_step, self._settings.steps
        speed = tokens * len(recent_s) / sum(recent_s) if recent_s else None
        energy = self._meter.read()
        append_jsonl(
            self._context.directory.metrics,
            {
                "step": done,
                "tokens": done * tokens,
                "attempt": self._context.attempt,
                "time": time.time(),
                **figures,
                "tokens_per_s": speed,
                **self._efficiency(speed),
                "node_power_w": energy.power_w_by_host,
                "node_energy_j": energy.energy_j_by_host,
                "energy_j": energy.energy_j,
            },
        )
        left = (steps - done) * sum(recent_s) / len(recent_s) if recent_s else None
        self._context.progress(text, done=done, total=steps, loss=loss, tokens_per_s=speed, seconds_left=left)

    def _efficiency(self, speed: float | None) -> dict[str, float | None]:
        """Model FLOP/s, derived from the measured speed; and MFU, where the peak is an accelerator's data sheet's: what
        a site states for the cores of "this machine" is too rough for that."""
        if speed is None or self._flops_per_token is None:
            return {"model_flops_per_s": None, "mfu": None}
        peak, ranks = self._context.task.machine.peak_flops_per_rank, self._settings.parallel.world_size
        mfu = model_flops_utilization(speed, self._flops_per_token, ranks, peak) if self._is_accelerator else None
        return {"model_flops_per_s": speed * self._flops_per_token, "mfu": mfu}
