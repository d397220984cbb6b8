"""Run by test_kill_matrix.py: kill a rank at every single thing it does to the file system during a save, then resume.

    python -m tests.train.faults OUT FOLDER [--engine]

Two ranks on a real process group load the checkpoint of step 10 and save step 20. A first, undisturbed pass notes what
each rank does below the checkpoints folder (opens, renames, removals, from Python's audit events; fsyncs and blocks
that are hashed, which lie between two pieces of a file). Then each of these is a case: right before it, a rank is
killed with SIGKILL: the one that was about to do it, or the other one. Two fresh ranks then load, compare every value,
and save step 30. This process imports the libraries once and forks, so a case takes a fraction of a second.

With --engine the state is that of a real DeepSpeed engine with expert parallelism, in training; it has many tensors,
and a kill falls between some of them.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc.errors import StorageError
from hpc.run.task import World
from hpc.train import saving, written
from hpc.train.checkpoint import Checkpoints
from hpc.train.fragments import Fragment, copy_fragments, read_fragments, write_fragments
from hpc.train.saving import Copy, Write

RANKS, SIZE, BLOCK = 2, 6000, 1 << 14
WORKERS = 2
ORIGIN = {"stage": "a1", "inputs": "b2"}


@dataclass
class Witness:
    """Sees what this process does to files below `root`, and pulls the plug at one of these things."""

    root: Path
    at: int = -1
    """Which one; none by default."""
    victim: int = 0
    """Process that is killed."""
    seen: list[str] = field(default_factory=list)
    is_on: bool = False

    def note(self, what: str) -> None:
        if not self.is_on:
            return
        self.seen.append(what)
        if len(self.seen) - 1 == self.at:
            self.is_on = False
            os.kill(self.victim, signal.SIGKILL)

    def watch(self) -> None:
        sys.addaudithook(self._hear)
        fsync, hasher = os.fsync, written.xxhash.xxh3_128

        def noted_fsync(descriptor: int) -> None:
            self.note(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
            fsync(descriptor)

        class Hasher:
            def __init__(this) -> None:
                this.state = hasher()

            def update(this, block: Any) -> None:
                self.note("hash block")
                this.state.update(block)

            def hexdigest(this) -> str:
                self.note("hash end")
                return str(this.state.hexdigest())

        os.fsync, written.BLOCK = noted_fsync, BLOCK

        class Module:
            xxh3_128 = Hasher

        written.xxhash = Module

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on or event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        if not isinstance(path, str | os.PathLike):
            return
        path = Path(path)
        if path.is_absolute() and self.root not in path.parents:
            return
        self.note(f"{event.removeprefix('os.')} {path.name}")


def state_of(rank: int, step: int) -> list[Fragment]:
    """Half of a parameter: numbers that no other step and rank has."""
    values = torch.arange(SIZE, dtype=torch.float32) + 10_000 * step + 5_000_000 * rank
    return [Fragment("a.weight", (RANKS * SIZE,), rank * SIZE, {"weight": values, "exp_avg": -values})]


class Plain:
    """A training state that is a function of the step."""

    def __init__(self, world: World) -> None:
        self.rank, self.step = world.rank, 0
        self.fragments = state_of(self.rank, 0)

    def train_to(self, step: int) -> None:
        self.step = step
        for mine, other in zip(self.fragments, state_of(self.rank, step), strict=True):
            for value, tensor in mine.values.items():
                tensor.copy_(other.values[value])
        dist.all_reduce(torch.zeros(1))

    def snapshot(self) -> Copy:
        step = self.step

        def copy() -> Write:
            held = copy_fragments(self.fragments, {})
            return lambda folder: write_fragments(folder, self.rank, held, step)

        return copy

    def load(self, folder: Path) -> int:
        self.step = read_fragments(folder, self.fragments)
        return self.step

    def fingerprint(self) -> list[float]:
        wanted = state_of(self.rank, self.step)
        right = all(
            torch.equal(a.values[v], b.values[v]) for a, b in zip(self.fragments, wanted, strict=True) for v in a.values
        )
        return [float(right)]


class Trained:
    """A real engine: two ranks, experts apart, ZeRO 1; a step of it is ten of ours."""

    def __init__(self, world: World) -> None:
        from hpc.model.build import build_model, model_config
        from hpc.train.engine import Engine
        from tests.train.exactness import settings_for

        self.settings, self.rank = settings_for("2/1/clip/1/qwen3_moe/adam/aux", RANKS), world.rank
        config = model_config(self.settings.model, self.settings.router, 64, 64, 0)
        self.engine = Engine(build_model(config, seed=0), self.settings, "cpu")

    def train_to(self, step: int) -> None:
        from hpc.evaluate.loss import token_losses
        from tests.train.exactness import data

        while self.engine._engine.global_steps < step // 10:
            ids = data()[self.engine._engine.global_steps, 4 * self.rank : 4 * self.rank + 4]
            self.engine.backward(token_losses(self.engine.forward(ids[:, :-1]), ids[:, 1:]).mean())
            self.engine.step(5e-3)

    def snapshot(self) -> Copy:
        return self.engine.snapshot(to_host=True)

    def load(self, folder: Path) -> int:
        self.engine.load(folder)
        return 10 * int(self.engine._engine.global_steps)

    def fingerprint(self) -> list[float]:
        fragments = self.engine._fragments()
        return [float(tensor.double().sum()) for f in fragments for tensor in f.values.values()]


State = Plain | Trained


def rank_main(
    rank: int, folder: Path, engine: bool, body: Callable[[State, Checkpoints, World], dict[str, Any]]
) -> None:
    """A rank of one attempt, in a forked process. Never returns."""
    saving.HURRY_S = 0.1
    signal.alarm(60)  # what hangs is a failure too
    log = os.open(folder / f"log-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        store = dist.FileStore(str(folder / "store"), RANKS)
        world = World(rank, RANKS, rank)
        timeout = timedelta(seconds=30)
        if engine:
            import deepspeed

            from hpc.train.engine import start_process_group

            dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timeout)
            deepspeed.utils.logger.setLevel("ERROR")
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_SIZE=str(RANKS))
            start_process_group(world, "cpu")
        else:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timeout)
        saved = Checkpoints(folder / "checkpoints", world, ORIGIN, keep=1)
        try:
            result = body(Trained(world) if engine else Plain(world), saved, world)
            (folder / f"result-{rank}.json").write_text(json.dumps(result))
            code = 0
        except BaseException as error:
            saved.settle()
            print(f"ended by {type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        os._exit(code)


def attempt(folder: Path, engine: bool, body: Callable[..., dict[str, Any]]) -> tuple[list[int], list[Any], str]:
    """Run an attempt of two ranks: exit statuses (-9 for a killed one), results, and what they printed."""
    for leftover in [folder / "store", *folder.glob("result-*"), *folder.glob("log-*"), *folder.glob("pid-*")]:
        leftover.unlink(missing_ok=True)
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            rank_main(rank, folder, engine, body)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    results = [
        json.loads(path.read_text()) if (path := folder / f"result-{rank}.json").exists() else None
        for rank in range(RANKS)
    ]
    return statuses, results, "".join((folder / f"log-{rank}").read_text() for rank in range(RANKS))


def saves(
    folder: Path, step: int, observer: int | None, at: int = -1, victim: int = 0
) -> Callable[[State, Checkpoints, World], dict[str, Any]]:
    """Load what is there, train to `step` and save it, under observation."""

    def body(state: State, saved: Checkpoints, world: World) -> dict[str, Any]:
        witness = Witness(folder / "checkpoints", at if world.rank == observer else -1)
        (folder / f"pid-{world.rank}").write_text(str(os.getpid()))
        found = saved.newest()
        if found and found[1] < step:
            state.load(found[0])
        state.train_to(step)
        dist.barrier()
        witness.victim = int((folder / f"pid-{victim}").read_text())
        witness.watch()
        witness.is_on = True
        saved.save(step, 2, state.snapshot())
        saved.copied()
        state.train_to(step + 10)  # the next update
        saved.wait()
        witness.is_on = False
        return {"seen": witness.seen}

    return body


def fills_up(state: State, saved: Checkpoints, world: World) -> dict[str, Any]:
    """Rank 1 meets a full disk half-way; what each rank raises, and what is taken after it."""

    def full() -> Write:
        def write(folder: Path) -> Any:
            (folder / "fragments-00001.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        return write

    state.train_to(20)
    saved.save(20, 2, full if world.rank == 1 else state.snapshot())
    saved.copied()
    state.train_to(30)
    began = time.monotonic()
    try:
        saved.save(30, 2, state.snapshot())
    except StorageError as error:
        left = sorted(path.name for path in saved.root.iterdir())
        dist.barrier()
        found = saved.newest()
        return {"error": str(error), "seconds": time.monotonic() - began, "left": left, "step": found and found[1]}
    return {}


def resumes(state: State, saved: Checkpoints, world: World) -> dict[str, Any]:
    """A fresh attempt after the fault: what is loaded, whether it is right, and whether it can go on."""
    found = saved.newest()
    assert found is not None
    state.load(found[0])
    values = state.fingerprint()
    state.train_to(30)
    saved.save(30, 3, state.snapshot())
    saved.wait()
    return {"step": found[1], "values": values, "left": sorted(path.name for path in saved.root.iterdir())}


def values_of(folder: Path, engine: bool) -> list[Any]:
    def body(state: State, saved: Checkpoints, world: World) -> dict[str, Any]:
        found = saved.newest()
        assert found is not None
        state.load(found[0])
        return {"values": state.fingerprint()}

    return [result["values"] for result in attempt(folder, engine, body)[1]]


def in_parallel(folder: Path, call: Callable[[Path, Any], dict[str, Any]], cases: list[Any]) -> list[dict[str, Any]]:
    """call(PLACE, case) of each case, in forked workers with a place of their own: a kill is mostly waiting."""
    workers = []
    for number in range(WORKERS):
        place = folder / f"worker-{number}"
        place.mkdir()
        child = os.fork()
        if child == 0:
            try:
                (place / "told.json").write_text(json.dumps([call(place, case) for case in cases[number::WORKERS]]))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        workers.append(child)
    assert [os.waitpid(child, 0)[1] for child in workers] == [0] * WORKERS
    parts = [json.loads((folder / f"worker-{number}/told.json").read_text()) for number in range(WORKERS)]
    return [parts[index % WORKERS][index // WORKERS] for index in range(len(cases))]


def main() -> None:
    """Every case, and what became of it, as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.engine:
        import hpc.train.engine  # noqa: F401
        import tests.train.exactness  # noqa: F401
    folder, engine = options.folder, options.engine
    root, template = folder / "checkpoints", folder / "template"
    folder.mkdir(exist_ok=True)

    statuses, _, log = attempt(folder, engine, saves(folder, 10, None))
    assert statuses == [0, 0], log
    shutil.copytree(root, template)
    good = {10: values_of(folder, engine)}
    statuses, noted, log = attempt(folder, engine, saves(folder, 20, None))
    assert statuses == [0, 0], log
    good[20] = values_of(folder, engine)
    shutil.copytree(root, folder / "twice")
    shutil.rmtree(root)
    shutil.copytree(template, root)
    _, full, log = attempt(folder, engine, fills_up)
    twice = folder / "twice"

    cases = [
        (template, observer, at, victim)
        for observer in range(RANKS)
        for at in range(len(noted[observer]["seen"]))
        for victim in range(RANKS)
        if noted[observer]["seen"][at] != "hash block" or (victim == observer and (not engine or at % 16 == 0))
    ]
    final = noted[0]["seen"].index("rename step-00000020")
    cases += [(twice, 0, at, 0) for at in range(final, final + 6)]

    def outcome(place: Path, start: Path, observer: int, at: int, victim: int) -> dict[str, Any]:
        """What became of one kill; everything happens below `place`."""
        root = place / "checkpoints"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(start, root)
        began = time.monotonic()
        statuses, _, killed_log = attempt(place, engine, saves(place, 20, observer, at, victim))
        published = (root / "step-00000020").exists()
        unfinished = any(root.glob(".staging-*"))
        second, results, log = attempt(place, engine, resumes)
        return {
            "again": start == twice, "observer": observer, "victim": victim,
            "what": noted[observer]["seen"][at] if start == template else f"{at - final} after the last rename",
            "statuses": statuses, "published": published, "unfinished": unfinished, "resumed": second,
            "step": results[0]["step"] if results[0] else None,
            "right": all(r and r["values"] == good[r["step"]][rank] for rank, r in enumerate(results)),
            "left": results[0]["left"] if results[0] else None,
            "said": [line for line in log.splitlines() if "not finished" in line or "damaged" in line],
            "log": killed_log[-1500:] + log[-1500:], "seconds": time.monotonic() - began,
        }  # fmt: skip

    told = in_parallel(folder, lambda place, case: outcome(place, *case), cases)
    options.out.write_text(json.dumps({"seen": [result["seen"] for result in noted], "cases": told, "full": full}))


if __name__ == "__main__":
    main()
