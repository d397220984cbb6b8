"""Errors that a user can cause, each with the exit code that `launch.py` ends with.

A message is one line: the setting, the value, a way out. Anything that is not a `GreenMoEError` is a bug of ours and
shows its traceback.
"""

from typing import ClassVar


class GreenMoEError(Exception):
    """Base of every error that is told to the user in one line."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class ConfigError(GreenMoEError):
    """The configuration cannot be loaded or asks for something impossible."""

    exit_code = 2


class DataError(GreenMoEError):
    """An input text, dataset or model cannot be read, or holds too little."""

    exit_code = 3


class ArtifactError(GreenMoEError):
    """A file that an earlier stage wrote is missing or damaged, or a checkpoint does not fit the run."""

    exit_code = 4


class StorageError(GreenMoEError):
    """The run directory cannot be written: no space left, no permission, not a directory."""

    exit_code = 5


class StageError(GreenMoEError):
    """A stage ended without a result: a lost rank, a crash, or a loss that is no longer finite."""

    exit_code = 6


class BusyError(GreenMoEError):
    """Another `launch.py run` is working in the same run directory."""

    exit_code = 7


class SiteError(GreenMoEError):
    """Slurm refused, or did not answer, or the site lacks what the chain needs."""

    exit_code = 8


class GateMissed(GreenMoEError):
    """A stage's gate was missed: what depends on it does not run."""

    exit_code = 9


class Fenced(GreenMoEError):
    """A newer attempt of the same stage has taken over; this one ends without a trace in the results."""

    exit_code = 10


class Hung(GreenMoEError):
    """A rank made no progress within its bound; the stacks of all ranks lie beside attempts.jsonl."""

    exit_code = 11


class TrackingError(GreenMoEError):
    """Weights & Biases cannot be reached, or has not taken everything; nothing is lost."""

    exit_code = 13


class Stopped(GreenMoEError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and did so cleanly; the next `run` resumes."""

    exit_code = 130


class BudgetSpent(Stopped):
    """The energy budget is spent; a checkpoint is safe: raise energy_budget_kwh to go on."""

    exit_code = 12


KINDS: tuple[type[GreenMoEError], ...] = (
    ConfigError,
    DataError,
    ArtifactError,
    StorageError,
    StageError,
    BusyError,
    SiteError,
    GateMissed,
    Fenced,
    Hung,
    BudgetSpent,
    TrackingError,
    Stopped,
)

EXIT_CODES: dict[int, str] = {
    0: "done",
    **{kind.exit_code: (kind.__doc__ or "").split("\n")[0] for kind in KINDS},
}
"""Exit code -> meaning, as `launch.py --help` prints it."""


def error_by_exit_code(exit_code: int, message: str) -> GreenMoEError:
    """The error a worker reported through its attempt record, rebuilt in the launcher."""
    return next((kind(message) for kind in KINDS if kind.exit_code == exit_code), StageError(message))
