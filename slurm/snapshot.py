"""A copy of the code that a chain was submitted with: edits after that change no job that waits or is requeued."""

import hashlib
import json
import shutil
from pathlib import Path

from hpc.run.directory import RunDirectory, storage_errors
from hpc.run.receipt import CODE_VERSION_FILE, code_version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hpc", "slurm")
SUFFIXES = {".py", ".j2"}


def snapshot(run: RunDirectory) -> Path:
    """Copy hpc/ and slurm/ into RUN/code/DIGEST, once for each content; returns the folder. Raises StorageError."""
    files = sorted(
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in SUFFIXES and path.is_file()
    )
    state = hashlib.sha256()
    for path in files:
        state.update(f"{path}\0".encode() + (ROOT / path).read_bytes() + b"\0")
    folder = run.root / "code" / state.hexdigest()[:12]
    if folder.exists():
        return folder
    staging = folder.with_name(f".{folder.name}")
    with storage_errors(folder):
        shutil.rmtree(staging, ignore_errors=True)
        for path in files:
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, staging / path)
        (staging / CODE_VERSION_FILE).write_text(json.dumps(code_version()))
        staging.rename(folder)
    return folder
