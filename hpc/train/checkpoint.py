"""Checkpoints that are complete or not there: staged, hashed, published by one rename, verified before they are read.

    checkpoints/step-00000100/MANIFEST.json   files with size and XXH3-128, step, digests of stage and inputs
    checkpoints/step-00000100/fragments-*     weights and optimizer states, for any layout (hpc/train/fragments.py)
    checkpoints/step-00000100/health.json     bad steps so far (hpc/train/health.py)
    checkpoints/committed.jsonl               one line per published checkpoint
    checkpoints/bad-step-...                  a checkpoint that failed its hashes, kept out of the way

A published checkpoint is never modified. `latest` does not exist: the newest directory that verifies is the latest.
Nothing in it is a pickle, and nothing is read before its hash matches the manifest.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from hpc.errors import ArtifactError
from hpc.run.directory import append_jsonl, read_jsonl, storage_errors, write_json
from hpc.run.task import World

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage. Every method is collective: all ranks call it, in the same order."""

    root: Path
    world: World
    origin: dict[str, Any]
    """Digests of what is learned, from what: a checkpoint of something else is refused."""
    keep: int

    def save(self, step: int, attempt: int, write: Callable[[Path], None]) -> float:
        """Publish a checkpoint whose files `write(folder)` makes on all ranks; returns the seconds it took."""
        began = time.monotonic()
        staging = self.root / f".staging-step-{step:08d}-{attempt}"
        if self.world.is_first:
            with storage_errors(self.root):
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
        dist.barrier()
        write(staging)
        dist.barrier()
        files = self._hash(staging)
        if self.world.is_first:
            manifest = {"step": step, "attempt": attempt, "time": time.time(), "origin": self.origin, "files": files}
            write_json(staging / MANIFEST, manifest)
            with storage_errors(self.root):
                final = self.root / f"step-{step:08d}"
                if final.exists():  # the same step reached again after falling back to an older checkpoint
                    final.rename(self.root / f".replaced-{final.name}-{attempt}")
                staging.rename(final)
                _sync_folder(self.root)
            append_jsonl(self.root / "committed.jsonl", {"step": step, "attempt": attempt})
            self._prune()
        dist.barrier()
        return time.monotonic() - began

    def newest(self) -> tuple[Path, int] | None:
        """Folder and step of the newest checkpoint that verifies; None when none was ever published.

        A damaged one is moved aside and the one before it is tried. Raises ArtifactError when all are damaged, or
        when the newest good one is of something else.
        """
        while True:
            names = [sorted(path.name for path in self.root.glob("step-*")) if self.root.exists() else []]
            dist.broadcast_object_list(names, src=0)
            if not names[0]:
                if read_jsonl(self.root / "committed.jsonl"):
                    raise ArtifactError(
                        f"{self.root} holds no readable checkpoint although some were published: restore one, or "
                        f"delete {self.root.parent} to start the stage again"
                    )
                return None
            folder = self.root / names[0][-1]
            damaged = self._damaged(folder)
            if damaged is None:
                manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
                self._check_origin(folder, manifest["origin"])
                return folder, int(manifest["step"])
            dist.barrier()
            if self.world.is_first:
                print(f"checkpoint {folder} is damaged ({damaged}): moved aside, trying the one before", flush=True)
                folder.rename(folder.with_name(f"bad-{folder.name}-{time.time_ns()}"))
            dist.barrier()

    def clear(self) -> None:
        """Delete all checkpoints once the stage's result is safe."""
        dist.barrier()
        if self.world.is_first:
            shutil.rmtree(self.root, ignore_errors=True)

    def _hash(self, folder: Path) -> list[dict[str, Any]]:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        mine = [
            {"path": str(path.relative_to(folder)), "bytes": path.stat().st_size, "xxh3_128": _hash_file(path)}
            for path in paths[self.world.rank :: self.world.size]
        ]
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, mine)
        return sorted((entry for part in everyone for entry in part), key=lambda entry: str(entry["path"]))

    def _damaged(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, the same answer on all ranks. Ranks read disjoint files."""
        problem = None
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            for entry in manifest["files"][self.world.rank :: self.world.size]:
                path = folder / entry["path"]
                if not path.is_file() or path.stat().st_size != entry["bytes"]:
                    problem = f"{entry['path']} is missing or cut off"
                elif _hash_file(path) != entry["xxh3_128"]:
                    problem = f"{entry['path']} has another hash"
        except (OSError, ValueError, KeyError) as error:
            problem = f"its manifest cannot be read: {error}"
        answers: list[Any] = [None] * self.world.size
        dist.all_gather_object(answers, problem)
        return next((answer for answer in answers if answer), None)

    def _check_origin(self, folder: Path, found: dict[str, Any]) -> None:
        for key, value in self.origin.items():
            if found.get(key) != value:
                raise ArtifactError(
                    f"{folder} was written with {key} = {found.get(key)}, this run has {value}: use the same value, or "
                    f"delete {self.root} to start the stage again"
                )

    def _prune(self) -> None:
        for path in sorted(self.root.glob("step-*"))[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)
        for leftover in [*self.root.glob(".staging-*"), *self.root.glob(".replaced-*")]:
            shutil.rmtree(leftover, ignore_errors=True)


def _hash_file(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
