"""Receipts: what a stage made, from what, with which code, and at which cost.

A receipt is written last, by atomic rename; a stage without one is not done. It lists every file of the artifact with
its size and SHA-256, so that the next stage can refuse a damaged one by name.
"""

import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hpc
from hpc.errors import ArtifactError
from hpc.run.directory import StageDirectory, write_json

CODE_VERSION_FILE = "code-version.json"
"""Beside the packages of a snapshot, which has no git of its own."""


@dataclass(frozen=True)
class Receipt:
    """The content of receipt.json."""

    stage: str
    kind: str
    config: dict[str, Any]
    """The stage as it was asked for."""
    inputs: dict[str, str]
    """Stage name -> digest of the artifact that was read."""
    files: list[dict[str, Any]]
    """path (relative to artifact/), bytes, sha256."""
    metrics: dict[str, Any]
    """Figures of the stage; gates and the report read them. A missing one is None."""
    provenance: dict[str, str]
    """Metric -> 'measured: ...', 'derived: ...' or 'estimated: ...'."""
    energy: dict[str, Any]
    """Joules over all attempts, with their provenance."""
    code: dict[str, str | None]
    """Version and commit of this software, versions of the libraries that matter."""
    seconds: float
    """Wall time of the attempt that finished."""
    attempts: int
    """How many attempts it took."""
    census: dict[str, Any] = field(default_factory=dict)
    """Tensors written, by group, where the artifact holds weights."""

    @property
    def digest(self) -> str:
        """One hash over the names and contents of all files."""
        return digest([[file["path"], file["sha256"]] for file in self.files])

    @property
    def size_bytes(self) -> int:
        """Size of the artifact."""
        return sum(int(file["bytes"]) for file in self.files)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(artifact: Path) -> list[dict[str, Any]]:
    """Every file below `artifact` with size and SHA-256, in order of name."""
    return [
        {"path": str(path.relative_to(artifact)), "bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(artifact.rglob("*"))
        if path.is_file()
    ]


def write_receipt(directory: StageDirectory, receipt: Receipt) -> None:
    """Publish a receipt. Raises StorageError."""
    write_json(directory.receipt, asdict(receipt))


def read_receipt(directory: StageDirectory) -> Receipt | None:
    """The receipt of a stage, None when it is not done. Raises ArtifactError when it cannot be read."""
    if not directory.receipt.exists():
        return None
    try:
        return Receipt(**json.loads(directory.receipt.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{directory.receipt} cannot be read ({error}): delete {directory.root} to make it again"
        ) from None


def verify(directory: StageDirectory, receipt: Receipt) -> None:
    """Compare every file of the artifact with its receipt. Raises ArtifactError that names the damaged file."""
    for entry in receipt.files:
        path = directory.artifact / entry["path"]
        remedy = f"restore it, or delete {directory.root} to make stage {receipt.stage!r} again"
        if not path.is_file():
            raise ArtifactError(f"{path} is missing, but the receipt of {receipt.stage!r} lists it: {remedy}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ArtifactError(f"{path} has {size:,} bytes, its receipt says {entry['bytes']:,}: {remedy}")
        if hash_file(path) != entry["sha256"]:
            raise ArtifactError(f"{path} is damaged (its SHA-256 is not the receipt's): {remedy}")


def code_version() -> dict[str, str | None]:
    """Version of this software and, in a git checkout, its commit (with '+changes' when files differ from it)."""
    root = Path(hpc.__file__).resolve().parent.parent
    if (root / CODE_VERSION_FILE).is_file():
        noted: dict[str, str | None] = json.loads((root / CODE_VERSION_FILE).read_text(encoding="utf-8"))
        return noted
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if commit and _git(root, "status", "--porcelain", "--untracked-files=no"):
        commit += "+changes"
    return {"greenmoe": hpc.__version__, "commit": commit}


def _git(root: Path, *arguments: str) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
