"""What a checkpoint costs training: saves beside it against saves that it waits for, in turns, in one run.

Two ranks on this machine train a mixture of experts of 38 million parameters with ZeRO 1 and expert parallelism, for
real. Each round has undisturbed steps, a synchronous save, and a save in the background with the steps beside it:

    stall       of a background save: what `save` itself takes and what the next update waits for the copy
    slow-down   of the steps during which it copies, writes and hashes: it uses cores and memory that they use too
    lost        both together: how much longer those steps took than as many undisturbed ones of the same round
    CPU         seconds of a core that copying, writing and hashing take: what is lost at most where all cores are busy
                with the training itself, as here; on a node with GPUs they are not
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from hpc.errors import StageError
from hpc.train.saving import Copy, Write
from hpc.train.written import Written

RANKS, PLAIN_STEPS, WARM_UP = 2, 3, 2
SETTINGS: dict[str, Any] = {
    "model": {"hidden_size": 512, "num_layers": 4, "num_attention_heads": 8, "expert_size": 512},
    "router": {"num_experts": 8, "top_k": 2},
    "batches": {"seq_len": 128, "micro_batch_size": 4, "tokens_per_step": RANKS * 4 * 128},
    "steps": 1000,
    "optimizer": {"lr": 1e-4},
    "parallel": {"ranks_per_node": RANKS, "expert_parallel_size": RANKS},
}
VOCABULARY = 8192


@dataclass
class Seen:
    """Seconds, as one rank saw them; lists have one entry per step or save."""

    plain: list[float] = field(default_factory=list)
    """Undisturbed steps."""
    busy: list[float] = field(default_factory=list)
    """Steps while a save ran in the background, without what they waited for its copy."""
    stall: list[float] = field(default_factory=list)
    """Time in `save` and waiting for the copy."""
    lost: list[float] = field(default_factory=list)
    """How much later than without a background save its last step ended."""
    background: list[float] = field(default_factory=list)
    """From `save` to the published checkpoint."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds of this rank's thread in a background save."""
    sync: list[float] = field(default_factory=list)


def measure(rounds: int, folder: Path | None = None) -> dict[str, Any]:
    """Run both ranks and put together what they saw; checkpoints go to `folder`, by default a temporary one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(tempfile.mkdtemp(prefix=".bench-checkpoint-", dir=folder))
    shared = {
        **os.environ, "WORLD_SIZE": str(RANKS), "LOCAL_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CROSS_RANK": "0", "CROSS_SIZE": "1",
    }  # fmt: skip
    try:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "hpc.bench.checkpoint", str(root), str(rounds)],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=Path(__file__).resolve().parents[2],
                stdout=subprocess.DEVNULL,
                stderr=(root / f"errors-{rank}").open("w"),
            )
            for rank in range(RANKS)
        ]
        if any([rank.wait() for rank in ranks]):
            last = [line for rank in range(RANKS) for line in (root / f"errors-{rank}").read_text().splitlines()[-1:]]
            raise StageError(f"a rank of the bench failed: {' / '.join(last)}")
        return summary(json.loads((root / "seen.json").read_text()))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def summary(seen: dict[str, Any]) -> dict[str, Any]:
    """Figures of the bench from what rank 0 wrote. Seconds unless the name says otherwise."""
    sync, plain, stall = median(seen["sync"]), median(seen["plain"]), median(seen["stall"])
    megabytes = seen["bytes"] / 1e6
    return {
        "stall_fraction": stall / sync,
        "stall_s": stall,
        "stall_max_s": max(seen["stall"]),
        "sync_s": sync,
        "megabytes": megabytes,
        "sync_mb_per_s": megabytes / sync,
        "background_s": median(seen["background"]),
        "plain_step_s": plain,
        "busy_step_s": median(seen["busy"]),
        "step_slowdown": median(seen["busy"]) / plain - 1,
        "cpu_s_per_rank": median(seen["cpu"]),
        "busy_steps_per_save": len(seen["busy"]) / len(seen["stall"]),
        "lost_s": median(seen["lost"]),
        "lost_fraction": median(seen["lost"]) / sync,
        "saves": len(seen["stall"]),
        "parameters": seen["parameters"],
        "ranks": RANKS,
        "cores": os.cpu_count(),
    }


def show(figures: dict[str, Any]) -> str:
    """The figures for people."""
    f = figures
    return "\n".join(
        [
            f"{f['parameters'] / 1e6:.0f} M parameters, {f['ranks']} ranks (ZeRO 1, EP 2) on {f['cores']} cores; "
            f"a checkpoint has {f['megabytes']:.0f} MB; {f['saves']} saves of each kind in turns, medians, measured",
            f"synchronous save          {f['sync_s']:8.3f} s   {f['sync_mb_per_s']:,.0f} MB/s, hashed and on the disk",
            f"stall of a background one {f['stall_s']:8.3f} s   {f['stall_fraction']:.1%} of that (limit 2 %), "
            f"at most {f['stall_max_s']:.3f} s",
            f"until it is published     {f['background_s']:8.3f} s",
            f"undisturbed step          {f['plain_step_s']:8.3f} s",
            f"step beside it            {f['busy_step_s']:8.3f} s   {f['step_slowdown']:+.0%}, "
            f"{f['busy_steps_per_save']:.1f} such steps per save",
            f"training loses in all     {f['lost_s']:8.3f} s   {f['lost_fraction']:.0%} of a synchronous save",
            f"a rank's background save  {f['cpu_s_per_rank']:8.3f} s of a core",
        ]
    )


def rank_main(root: Path, rounds: int) -> None:
    """One rank of the bench; rank 0 writes seen.json with the slowest rank's figures."""
    import torch
    import torch.distributed as dist

    from hpc.config.train import Training
    from hpc.evaluate.loss import token_losses
    from hpc.model.build import build_model, model_config
    from hpc.run.task import World
    from hpc.train.checkpoint import Checkpoints
    from hpc.train.engine import Engine, start_process_group

    world = World(int(os.environ["RANK"]), RANKS, int(os.environ["LOCAL_RANK"]), RANKS)
    start_process_group(world, "cpu")
    settings = Training.model_validate(SETTINGS)
    model = build_model(model_config(settings.model, settings.router, VOCABULARY, settings.batches.seq_len, 0), seed=0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = Engine(model, settings, "cpu")
    generator = torch.Generator().manual_seed(world.rank)
    kinds = {
        in_background: Checkpoints(root / "checkpoints", world, {}, keep=1, in_background=in_background)
        for in_background in (False, True)
    }
    background, seen, number = kinds[True], Seen(), 0
    for checkpoints in kinds.values():
        checkpoints.expect(engine.checkpoint_bytes)

    def step() -> tuple[float, float]:
        """Seconds of a step, and of what its update waited for a copy."""
        began = time.monotonic()
        shape = (settings.batches.micro_batch_size, settings.batches.seq_len + 1)
        ids = torch.randint(VOCABULARY, shape, generator=generator)
        engine.backward(token_losses(engine.forward(ids[:, :-1]), ids[:, 1:]).mean())
        ready = time.monotonic()
        background.copied()
        waited = time.monotonic() - ready
        engine.step(1e-4)
        return time.monotonic() - began, waited

    def save(in_background: bool) -> float:
        nonlocal number
        number += 1
        dist.barrier()  # ranks that wait for each other are no part of a save
        began = time.monotonic()
        copy = engine.snapshot(to_host=in_background)
        kinds[in_background].save(number, 1, timed(copy) if in_background else copy)
        return time.monotonic() - began

    def timed(copy: Copy) -> Copy:
        def copy_and_time() -> Write:
            write = copy()

            def write_and_time(folder: Path) -> list[Written]:
                files = write(folder)
                seen.cpu.append(time.thread_time())  # the thread lives for this save alone
                return files

            return write_and_time

        return copy_and_time

    def beside() -> None:
        """A background save and the steps beside it, until it is published on all ranks."""
        began = time.monotonic()
        stall, seconds, running = save(in_background=True), [], torch.ones(1)
        while running:
            took, waited = step()
            stall += waited
            seconds.append(took - waited)
            running.fill_(float(background.is_running))
            dist.all_reduce(running)
        total = time.monotonic() - began
        background.wait()
        seen.busy += seconds
        seen.stall.append(stall)
        seen.lost.append(total - len(seconds) * median(seen.plain[-PLAIN_STEPS:]))
        seen.background.append(background.seconds)
        background.seconds = 0.0

    for _ in range(WARM_UP):
        step()
    save(in_background=True)  # host memory is got here, once
    step()
    background.wait()
    background.seconds = 0.0
    seen.cpu.clear()
    for _ in range(rounds):
        seen.plain += [step()[0] for _ in range(PLAIN_STEPS)]
        seen.sync.append(save(in_background=False))
        step()
        beside()
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, vars(seen))
    if world.is_first:
        slowest = {key: [max(values) for values in zip(*(rank[key] for rank in everyone), strict=True)]
                   for key in vars(seen)}  # fmt: skip
        size = sum(path.stat().st_size for path in (root / "checkpoints").rglob("*.safetensors"))
        (root / "seen.json").write_text(json.dumps({**slowest, "bytes": size, "parameters": parameters}))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), int(sys.argv[2]))
