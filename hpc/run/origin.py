"""Where an artifact came from when another run made it: origin.json in the folder of the stage that reads it.

A stage that starts from a model of another run calls `record_origin` with the folder of the stage that made it (the
one with receipt.json beside artifact/). The note holds what that stage and everything it was made from had drawn by
then, so that the ledger of this run stays true when the other run is moved or deleted.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from hpc.errors import ArtifactError
from hpc.run.directory import StageDirectory, append_jsonl, read_jsonl, write_json

USERS_FILE = "users.jsonl"
"""In the folder of a stage: the runs that started from its artifact, as far as they could note it there."""


@dataclass(frozen=True)
class Ancestor:
    """A stage of another run that an artifact was made by, or made from."""

    run: str
    stage: str
    digest: str
    """Of its artifact."""
    energy_j: float | None
    """Useful and lost, over all its attempts; None when nothing was measured."""
    users: int = 1
    """Runs known to have started from it, this one among them."""
    share: float = 1.0
    """The part that this run states as its own; 1 unless somebody decided otherwise."""


def write_origins(directory: StageDirectory, ancestors: Sequence[Ancestor]) -> None:
    """Publish what a stage started from. Raises StorageError."""
    write_json(directory.root / "origin.json", [asdict(one) for one in ancestors])


def read_origins(directory: StageDirectory) -> list[Ancestor]:
    """What a stage started from besides its run's own stages. Raises ArtifactError when the note cannot be read."""
    path = directory.root / "origin.json"
    if not path.exists():
        return []
    try:
        return [Ancestor(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): delete {directory.root} to make it again") from None


def note_user(base: StageDirectory, run: str) -> int:
    """Tell the base that a run starts from it; returns how many runs are known to. One whose folder cannot be written
    (another person's) counts those that it knows, and this one."""
    path = base.root / USERS_FILE
    known = {str(row["run"]) for row in read_jsonl(path)}
    if run not in known:
        with suppress(Exception):
            append_jsonl(path, {"run": run})
    return len(known | {run})
