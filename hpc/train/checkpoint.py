"""Checkpoints that are complete or not there: staged, hashed, published by one rename, verified before they are read.

    checkpoints/step-00000100/MANIFEST.json   files with size and XXH3-128, step, what was learned from what, layout,
                                              versions, and its own hash
    checkpoints/step-00000100/fragments-*     weights and optimizer states, for any layout (hpc/train/fragments.py)
    checkpoints/step-00000100/health.json     bad steps so far (hpc/train/health.py)
    checkpoints/committed.jsonl               one line per published checkpoint
    checkpoints/bad-step-...                  a checkpoint that failed its hashes, kept out of the way
    checkpoints/.staging-... .replaced-... .pruned-...    on their way in or out; never read

A published checkpoint is never modified. `latest` does not exist: the newest directory that verifies is the latest.
Nothing in it is a pickle, and nothing is read before its hash matches the manifest.

Weights and moments change only in the optimizer's update. So a save copies them to host memory while the next forward
and backward passes run, the update waits for that copy (normally it is done), and everything else (writing, hashing,
publishing: hpc/train/saving.py) takes place beside training. The idea is that of arXiv:2406.10707.
"""

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

import hpc
from hpc.config import TrainingBase
from hpc.errors import ArtifactError, StorageError, error_by_exit_code
from hpc.run.directory import append_jsonl, read_jsonl, storage_errors, write_json
from hpc.run.task import World
from hpc.train import saving
from hpc.train.saving import Copy, Problem, Save, free_bytes, sync_folder
from hpc.train.written import Written, hash_file

MANIFEST = "MANIFEST.json"
WAIT_S = 0.1
"""How often ranks that wait for a save hear of each other."""
LIBRARIES = ("torch", "deepspeed", "transformers", "safetensors")
HEADERS_BYTES = 1 << 20
"""What a checkpoint takes besides its values, at most: headers, manifest, passport."""


class Checkpoints:
    """The checkpoints of one stage. Methods marked collective are called by all ranks, in the same order."""

    def __init__(
        self,
        root: Path,
        world: World,
        origin: dict[str, Any],
        *,
        keep: int,
        keep_every: int | None = None,
        in_background: bool = True,
        facts: dict[str, Any] | None = None,
        check_fence: Callable[[], None] = lambda: None,
    ) -> None:
        """`origin`: digests of what is learned, from what data; a checkpoint of something else is refused.
        `keep`, `keep_every`: how many of the newest stay, and which steps stay for good. `facts`: goes into manifests.
        `check_fence`: raises when another attempt has taken over; asked before anything is published."""
        self.root, self.world, self.origin, self.facts = root, world, origin, facts or {}
        self.keep, self.keep_every, self.in_background, self.check_fence = keep, keep_every, in_background, check_fence
        self.seconds = 0.0
        """The longest that a save of this attempt took on this rank until it was published."""
        self._needed = 0
        self._saves = 0
        self._running: Save | None = None

    def expect(self, bytes_here: int) -> None:
        """Say how much this rank will write, and check that one checkpoint of all ranks fits. Collective.

        Raises StorageError on all ranks.
        """
        everyone: list[Any] = [0] * self.world.size
        dist.all_gather_object(everyone, bytes_here)
        self._needed = sum(everyone) + HEADERS_BYTES
        self._on_first(self._check_space)

    def save(self, step: int, attempt: int, copy: Copy) -> None:
        """Begin to publish what `copy` copies on all ranks. Collective; waits for a save that is still running.

        After it, `copied` must be called before the state changes. Raises on all ranks what stopped the save before;
        what stops this one, such as a disk without room for it, is told by `has_failed` and raised by `wait`.
        """
        self.wait()
        self._saves += 1
        staging = self.root / f".staging-step-{step:08d}-{attempt}-{self._saves}"
        self._running = Save(staging, self.world, copy, self._check_space, partial(self._publish, step, attempt))
        self._running.start()
        if not self.in_background:
            self.wait()

    def copied(self) -> None:
        """Wait until the running save no longer reads the training state: right before each update."""
        if self._running is not None:
            self._running.copied.wait()

    @property
    def is_running(self) -> bool:
        """Whether this rank still has something to do for a save."""
        return self._running is not None and self._running.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether the running save has failed on this rank: all ranks should stop, and `wait` tells them why."""
        return self._running is not None and self._running.error is not None

    def wait(self) -> None:
        """Wait until the running save, if any, is published. Collective; raises on all ranks what stopped it on one."""
        if self._running is None:
            return
        save = self._running
        answers: list[Any] = [None] * self.world.size
        while True:  # talking all the time: a rank that died is noticed at once
            dist.all_gather_object(answers, (save.is_alive(), save.problem()))
            alive, problems = zip(*answers, strict=True)
            save.is_given_up = any(problems)
            if not any(alive):
                break
            save.join(WAIT_S)
        self._running = None
        self.seconds = max(self.seconds, save.seconds)
        if not any(problems):
            return
        if self.world.is_first:  # on a full disk, the room is needed to say so
            shutil.rmtree(save.staging, ignore_errors=True)
        first = min((problem for problem in problems if problem), key=lambda problem: bool(problem.is_echo))
        if save.error is not None and problems[self.world.rank] is first:
            raise save.error
        raise _rebuilt(first)

    def settle(self) -> None:
        """Let a running save end before this rank does, whatever the others do. For the way out after an error."""
        if self._running is not None:
            self._running.patience_s = saving.HURRY_S
            self._running.join(saving.SILENCE_S)

    def newest(self) -> tuple[Path, int] | None:
        """Folder and step of the newest checkpoint that verifies; None when none was ever published. Collective.

        A damaged one is moved aside and the one before it is tried. Raises ArtifactError when all are damaged, or
        when the newest good one is of something else.
        """
        self.wait()
        self._on_first(self._tidy)
        while True:
            names = [[path.name for path in published(self.root)]]
            dist.broadcast_object_list(names, src=0)
            if not names[0]:
                if read_jsonl(self.root / "committed.jsonl") or any(self.root.glob("bad-step-*")):
                    raise ArtifactError(
                        f"{self.root} holds no readable checkpoint although some were published: restore one, or "
                        f"delete {self.root.parent} to start the stage again"
                    )
                return None
            folder = self.root / names[0][-1]
            answers: list[Any] = [None] * self.world.size
            dist.all_gather_object(answers, damage(folder, self.world.rank, self.world.size))
            damaged = next((answer for answer in answers if answer), None)
            if damaged is None:
                self._check_origin(folder, read_manifest(folder)["origin"])
                return folder, step_of(folder)
            self._on_first(partial(_quarantine, folder, damaged))

    def clear(self) -> None:
        """Delete the checkpoints that are not for good, once the stage's result is safe. No save may be running."""
        if self.world.is_first:
            for path in published(self.root):
                if not self._is_milestone(path):
                    _remove(path)
            if not published(self.root):
                shutil.rmtree(self.root, ignore_errors=True)

    def _publish(self, step: int, attempt: int, staging: Path, files: list[Written]) -> None:
        """Rank 0, in its thread, when all ranks have written their parts."""
        content = {
            "step": step,
            "attempt": attempt,
            "time": time.time(),
            "origin": self.origin,
            **self.facts,
            "files": [asdict(file) for file in sorted(files, key=lambda file: file.path)],
        }
        write_json(staging / MANIFEST, {**content, "xxh3_128": _digest(content)})
        sync_folder(staging)
        self.check_fence()
        final = self.root / f"step-{step:08d}"
        if final.exists():  # the same step reached again, after going back to an older checkpoint
            final.rename(self.root / f".replaced-{final.name}")
        staging.rename(final)
        sync_folder(self.root)
        append_jsonl(self.root / "committed.jsonl", {"step": step, "attempt": attempt})
        for path in self.root.glob(".replaced-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in published(self.root)[: -self.keep]:
            if not self._is_milestone(path):
                _remove(path)

    def _is_milestone(self, path: Path) -> bool:
        return self.keep_every is not None and step_of(path) % self.keep_every == 0

    def _check_space(self) -> None:
        free = free_bytes(self.root)
        if free < self._needed:
            raise StorageError(
                f"a checkpoint takes {self._needed / 1e6:,.0f} MB and {self.root} has {free / 1e6:,.0f} MB free: "
                f"free some space, lower train.keep_checkpoints = {self.keep}, or --set run_root=DIR"
            )

    def _tidy(self) -> None:
        """Undo or finish what killed attempts left half done, and say so."""
        for path in self.root.glob(".replaced-step-*"):  # killed between two renames: the old one is the good one
            if not (final := self.root / path.name.removeprefix(".replaced-")).exists():
                path.rename(final)
        for path in self.root.glob(".staging-*"):
            print(f"a save was not finished ({path.name}): going on from the one before", flush=True)
            shutil.rmtree(path, ignore_errors=True)
        for path in [*self.root.glob(".replaced-*"), *self.root.glob(".pruned-*")]:
            shutil.rmtree(path, ignore_errors=True)

    def _check_origin(self, folder: Path, found: dict[str, Any]) -> None:
        for key, value in self.origin.items():
            if found.get(key) != value:
                raise ArtifactError(
                    f"{folder} was written with {key} = {found.get(key)}, this run has {value}: use the same value, or "
                    f"delete {self.root} to start the stage again"
                )

    def _on_first(self, action: Callable[[], None]) -> None:
        """Do something on rank 0, and wait for it; what it raises is raised on all ranks."""
        problem: list[Problem | None] = [None]
        error: Exception | None = None
        if self.world.is_first:
            try:
                action()
            except Exception as caught:
                error = caught
                problem = [Problem(getattr(caught, "exit_code", None), str(caught), is_echo=False)]
        dist.broadcast_object_list(problem, src=0)
        if error is not None:
            raise error
        if problem[0] is not None:
            raise _rebuilt(problem[0])


def published(root: Path) -> list[Path]:
    """Checkpoints below a folder that may not exist, oldest first; whatever else lies there is not looked at."""
    return sorted((path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """Step of a published checkpoint."""
    return int(folder.name.removeprefix("step-"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a manifest. Raises ValueError when it is not as it was written."""
    content: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.pop("xxh3_128", None) != _digest(content):
        raise ValueError("it does not match its own hash")
    return content


def damage(folder: Path, rank: int = 0, size: int = 1) -> str | None:
    """What is wrong with a checkpoint, None when nothing is. Of several ranks, each looks at other files."""
    if folder.is_symlink():
        return "it is a link"
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read: {error}"
    if manifest["step"] != step_of(folder):
        return f"its manifest is of step {manifest['step']}"
    for name in {path.name for path in folder.glob("fragments-*")} - {entry["path"] for entry in manifest["files"]}:
        return f"{name} is not in its manifest"
    for entry in manifest["files"][rank::size]:
        path = folder / entry["path"]
        try:
            if path.is_symlink() or not path.is_file() or path.stat().st_size != entry["bytes"]:
                return f"{entry['path']} is missing, cut off or a link"
            if hash_file(path) != entry["xxh3_128"]:
                return f"{entry['path']} has another hash"
        except OSError as error:
            return f"{entry['path']} cannot be read: {error}"
    return None


def _quarantine(folder: Path, damaged: str) -> None:
    print(f"checkpoint {folder} is damaged ({damaged}): moved aside, trying the one before", flush=True)
    with storage_errors(folder):
        folder.rename(folder.with_name(f"bad-{folder.name}-{time.time_ns()}"))


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves no half of it under its name."""
    out = folder.with_name(f".pruned-{folder.name}")
    folder.rename(out)
    shutil.rmtree(out, ignore_errors=True)


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _rebuilt(problem: Problem) -> Exception:
    """An error of another rank."""
    if problem.exit_code is None:
        return RuntimeError(problem.text)
    return error_by_exit_code(problem.exit_code, problem.text)


def checkpoint_facts(settings: TrainingBase) -> dict[str, Any]:
    """What a manifest says besides: layout and versions. For people; a checkpoint is read in any layout."""
    parallel = settings.parallel
    layout = {"ranks": parallel.world_size, "expert_parallel_size": parallel.expert_parallel_size,
              "zero_stage": parallel.zero_stage}  # fmt: skip
    return {"layout": layout, "versions": {"greenmoe": hpc.__version__, **{name: version(name) for name in LIBRARIES}}}
