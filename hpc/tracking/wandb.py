"""The door to Weights & Biases: one run per stage, grouped by the chain, written by rank 0 only.

Nothing is lost without it: metrics.jsonl is written first, and a W&B failure is told once and then ignored. Settings
whose names begin with x_ are private to wandb 0.31, hence the pin in pyproject.toml.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from hpc.config import Tracking


class Mirror:
    """A copy of a stage's rows in W&B; does nothing when W&B is disabled or out of order."""

    def __init__(self, run: Any = None) -> None:
        self._run = run

    @classmethod
    def start(
        cls,
        tracking: Tracking,
        *,
        chain: str,
        stage: str,
        kind: str,
        folder: Path,
        identity: str,
        config: dict[str, Any],
    ) -> "Mirror":
        """Begin or resume the W&B run of a stage.

        identity: the same for every attempt of a stage, so that a resumed attempt goes on in the same W&B run.
        """
        mode = tracking.wandb
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        if mode == "disabled":
            return cls()
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            run = wandb.init(
                project=tracking.project,
                entity=tracking.entity,
                group=chain,
                job_type=kind,
                name=f"{chain}/{stage}",
                id=hashlib.sha256(identity.encode()).hexdigest()[:16],
                resume="allow",
                mode=mode,
                dir=str(folder),
                config=config,
                settings=wandb.Settings(x_transaction_log_flush_interval=1, console="off", x_disable_stats=True),
            )
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        except Exception as error:  # W&B must never end a training run
            print(f"wandb: {error}; going on without it, metrics.jsonl is complete", flush=True)
            return cls()
        return cls(run)

    def log(self, row: dict[str, Any]) -> None:
        """Send a row: nested lists become one key per layer and expert."""
        self._try(lambda run: run.log(flatten(row)))

    def summary(self, values: dict[str, Any]) -> None:
        """Set final figures."""
        self._try(lambda run: run.summary.update(flatten(values)))

    def finish(self, exit_code: int = 0) -> None:
        """Flush and close. Called on every way out of a stage, signals included."""
        self._try(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _try(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            print(f"wandb: {error}; going on without it, metrics.jsonl is complete", flush=True)
            self._run = None


def flatten(row: dict[str, Any]) -> dict[str, float | int | str]:
    """W&B keys of a row: `router_load` (layers of experts) becomes router_load/layer_0/expert_3, None is left out."""
    flat: dict[str, float | int | str] = {}
    for key, value in row.items():
        if key == "router_load":
            for layer, experts in enumerate(value):
                flat.update({f"router_load/layer_{layer}/expert_{e}": load for e, load in enumerate(experts)})
        elif isinstance(value, dict):
            flat.update({f"{key}/{name}": inner for name, inner in flatten(value).items()})
        elif isinstance(value, (int, float, str)):
            flat[key] = value
    return flat
