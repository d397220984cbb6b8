"""wandb/ticket.json: which W&B run a stage is mirrored to, for the process that mirrors it and for `launch.py sync`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc.run.directory import storage_errors, write_json


@dataclass(frozen=True)
class Ticket:
    """One W&B run per stage: every attempt with the same inputs and configuration has the same ticket."""

    id: str
    """Of the W&B run, the same for all attempts, so that a resumed one goes on in the same run."""
    project: str
    entity: str | None
    group: str
    """The chain."""
    name: str
    kind: str
    """Of the stage; W&B's job type."""
    produces: str
    """What the stage makes: tokens, model, ...; the type of its artifact."""
    has_steps: bool
    """Whether the stage logs rows of metrics; otherwise its rows are the samples of its nodes."""
    mode: str
    """What the newest attempt was asked for: online or offline."""
    config: dict[str, Any]
    """What was asked, inputs with their digests and W&B runs, versions."""

    @staticmethod
    def path(stage_root: Path) -> Path:
        """Where the ticket of a stage lies."""
        return stage_root / "wandb" / "ticket.json"

    @classmethod
    def read(cls, stage_root: Path) -> "Ticket":
        """The ticket of a stage that has one."""
        return cls(**json.loads(cls.path(stage_root).read_text(encoding="utf-8")))

    def write(self, stage_root: Path) -> None:
        """Publish it. Raises StorageError."""
        path = self.path(stage_root)
        with storage_errors(path):
            path.parent.mkdir(exist_ok=True)
        write_json(path, asdict(self))
