"""What goes between hpc/runtimes/remote.py and the process that an artifact is opened in."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hpc.errors import GreenMoEError
from hpc.runtimes.artifact import Runtime

MORE = "more"
"""What the caller of a stream says after a token to get the next one; anything else ends it."""


@dataclass(frozen=True)
class Opening:
    """The first request."""

    runtime: Runtime
    path: Path
    context_length: int
    threads: int


@dataclass(frozen=True)
class Reply:
    """An answer, or a token of one that is not complete."""

    value: Any = None
    seconds: float = 0.0
    """What the runtime took, without the way to the caller."""
    is_last: bool = True
    error: GreenMoEError | None = None


def send(stream: BinaryIO, message: object) -> None:
    """Write one message."""
    pickle.dump(message, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()
