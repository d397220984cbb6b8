"""A few real steps of a training stage on this machine: how long one takes, and how much memory a rank comes to hold.

What `plan --calibrate` and the test of the plan's memory measure with. Every rank is a fresh process with the
environment that ranks of a stage have, and does what the training loop does: rehearse, train, copy the state as a
checkpoint does, evaluate. Tokens are random, from a part of the vocabulary that changes from batch to batch: routers
then meet loads as different as in a long stage, and so does the memory that depends on them.
"""

import gc
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hpc.config import AdapterTraining, Model, Router, TrainingBase
from hpc.config.train import Training
from hpc.errors import StageError

PATIENCE_S = 900.0
WARM_UP = 2
"""Steps that are not timed: kernels are generated, memory grows."""


@dataclass(frozen=True)
class MeasuredSteps:
    """Of all ranks together, where not said otherwise."""

    step_s: float
    """Median over the steps that were timed, of the slowest rank."""
    tokens_per_s: float
    cpu_share: float
    """CPU seconds of a rank over seconds of a step: far below 1 on a CPU, others use the machine too."""
    peak_memory_bytes: tuple[int, ...]
    """Of each rank, at its end: resident on a CPU, allocated on an accelerator."""
    start_memory_bytes: tuple[int, ...]
    """Of each rank before it had a model: interpreter and libraries."""
    tensor_bytes: tuple[int, ...] | None
    """Of each rank: what tensors took at their most, on a CPU, where it was asked for; the copy of the state that a
    checkpoint is written from is not counted."""


def measure_steps(
    settings: TrainingBase,
    model: Model,
    router: Router,
    vocab_size: int,
    environment: Mapping[str, str],
    device: str = "auto",
    steps: int = 3,
    *,
    warm_up: int = WARM_UP,
    count_tensors: bool = False,
) -> MeasuredSteps:
    """Train `warm_up` + `steps` steps on as many processes of this machine as the stage has ranks. Raises StageError.

    count_tensors: with torch's profiler, which takes time and memory itself.
    """
    ranks = settings.parallel.world_size
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        case = {
            "adapters": isinstance(settings, AdapterTraining), "settings": settings.model_dump(mode="json"),
            "model": model.model_dump(mode="json"), "router": router.model_dump(mode="json"),
            "vocab_size": vocab_size, "device": device, "steps": steps,
            "warm_up": warm_up, "count_tensors": count_tensors,
        }  # fmt: skip
        (Path(folder) / "case.json").write_text(json.dumps(case), encoding="utf-8")
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "hpc.bench.step", folder],
                env={**os.environ, **environment, **_rank_environment(rank, ranks, port)},
                stdout=subprocess.DEVNULL, stderr=(Path(folder) / f"errors-{rank}").open("wb"),
            )
            for rank in range(ranks)
        ]  # fmt: skip
        try:
            codes = [process.wait(PATIENCE_S) for process in processes]
        except subprocess.TimeoutExpired:
            raise StageError(f"the steps to measure took longer than {PATIENCE_S:.0f} s") from None
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            words = (Path(folder) / f"errors-{failed}").read_text(errors="replace").strip().splitlines()
            raise StageError(f"the steps to measure failed on rank {failed}: {words[-1] if words else 'no word'}")
        told = [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    seconds = median(max(times) for times in zip(*(rank["step_s"] for rank in told), strict=True))
    return MeasuredSteps(
        step_s=seconds,
        tokens_per_s=settings.batches.tokens_per_step / seconds,
        cpu_share=min(rank["cpu_share"] for rank in told),
        peak_memory_bytes=tuple(rank["peak"] for rank in told),
        start_memory_bytes=tuple(rank["start"] for rank in told),
        tensor_bytes=tuple(rank["tensors"] for rank in told) if count_tensors else None,
    )


def _rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "LOCAL_SIZE": ranks,
               "CROSS_RANK": 0, "CROSS_SIZE": 1, "MASTER_PORT": port}  # fmt: skip
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    texts = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
             "PYTHONPATH": os.pathsep.join(paths)}  # fmt: skip
    return {**texts, **{name: str(value) for name, value in numbers.items()}}


def main(folder: Path) -> None:
    """One rank: reads case.json, writes rank-N.json."""
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    kind = AdapterTraining if case["adapters"] else Training
    settings: Any = kind.model_validate(case["settings"])
    model, router = Model.model_validate(case["model"]), Router.model_validate(case["router"])
    rank = int(os.environ["RANK"])
    told = _train(settings, model, router, case)
    (folder / f"rank-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


def _train(settings: Any, shape: Model, router: Router, case: dict[str, Any]) -> dict[str, Any]:
    import torch

    from hpc.adapt.lora import attach, base_name
    from hpc.evaluate.loss import token_losses
    from hpc.model.build import build_model, model_config
    from hpc.model.routing import RouterProbe
    from hpc.run.task import World
    from hpc.stages import pretrain  # noqa: F401  (its libraries are part of what a rank holds)
    from hpc.train.engine import Engine, pick_device, start_process_group

    rank, ranks, vocab_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), case["vocab_size"]
    device = pick_device(case["device"])
    start_process_group(World(rank, ranks, rank, ranks), device)
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counter = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    if case["count_tensors"]:
        counter.start()
    config = model_config(shape, router, vocab_size, settings.batches.seq_len, 0)
    model: Any = build_model(config, seed=0)
    if isinstance(settings, AdapterTraining):
        model = attach(model, settings, 0)
    engine = Engine(model, settings, device)
    if isinstance(settings, AdapterTraining) and settings.base_bits is not None:
        engine.fill(_Noise(), base_name)
    probe = RouterProbe(engine.module)
    generator = torch.Generator().manual_seed(rank)
    size, length = settings.batches.micro_batch_size, settings.batches.seq_len
    positions = torch.arange(length).remainder(max(1, length // 2)).repeat(size, 1)  # two documents in a sequence

    def batch() -> tuple[Any, Any]:
        part = int(vocab_size ** (0.3 + 0.7 * float(torch.rand((), generator=generator))))
        first = int(torch.randint(0, vocab_size - part + 1, (), generator=generator))
        ids = torch.randint(first, first + part, (size, length + 1), generator=generator)
        return ids[:, :-1], ids[:, 1:]

    def one_pass() -> None:
        loss = engine.loss(*batch(), positions)
        heard = probe.collect(None)
        engine.backward(loss + (0.0 if isinstance(settings, AdapterTraining) else router.aux_loss) * heard.aux_loss)

    def evaluate() -> None:
        engine.module.eval()
        with torch.no_grad():
            ids, targets = batch()
            token_losses(engine.forward(ids, positions), targets)
        engine.module.train()
        probe.discard()

    marks: list[tuple[int, int]] = []

    def mark() -> None:
        if case["count_tensors"]:
            marks.append((time.time_ns(), _live_bytes()))

    engine.rehearse(one_pass)
    mark()
    evaluate()
    mark()
    seconds: list[float] = []
    cpu_s = 0.0
    for _ in range(case["warm_up"] + case["steps"]):
        began, began_cpu = time.perf_counter(), time.process_time()
        for _ in range(settings.gradient_accumulation_steps):
            one_pass()
            engine.step(settings.optimizer.lr / 10)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        cpu_s += time.process_time() - began_cpu
        mark()
        if settings.checkpoint_async and len(seconds) == case["warm_up"] and not case["count_tensors"]:
            copy = threading.Thread(target=engine.snapshot(to_host=True))
            copy.start()
            copy.join()
    evaluate()
    tensors = None
    if case["count_tensors"]:
        counter.stop()
        tensors = _most(counter, marks)
    return {
        "step_s": seconds[case["warm_up"] :], "cpu_share": cpu_s / sum(seconds), "peak": engine.peak_memory_bytes,
        "start": started, "tensors": tensors,
    }  # fmt: skip


class _Noise:
    """Weights for a base in four bits, which takes them when it is filled and no sooner."""

    def fill(self, name: str, start: int, target: Any) -> None:
        """Random ones, but for norms."""
        if "norm" in name:
            target.fill_(1.0)
        else:
            target.normal_(std=0.02)


def _live_bytes() -> int:
    """Bytes of all tensors that there are between two passes."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _most(counter: Any, marks: list[tuple[int, int]]) -> int:
    """The most bytes that tensors had at a time, from a profiler's record of allocations.

    It misses what gloo's threads free, so every stretch between two marks starts at what was counted there.
    """
    events = [(event.start_ns(), event.nbytes()) for event in counter.profiler.kineto_results.events()
              if event.name() == "[memory]"]  # fmt: skip
    events.sort(key=lambda event: event[0])
    place = held = most = 0
    for at, live in [*marks, (2**63, 0)]:
        while place < len(events) and events[place][0] <= at:
            held += events[place][1]
            most, place = max(most, held), place + 1
        held = live
    return most


if __name__ == "__main__":
    main(Path(sys.argv[1]))
