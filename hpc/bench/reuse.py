"""What loading a checkpoint takes: the most memory that a rank ever holds, layout by layout, against what it has to
keep; and time and memory in one process beside transformers' from_pretrained.

A rank that held the whole model, if only for a moment, would show here: the checkpoint is mostly experts, a rank's
limit is its share of them, and the kernel's high-water mark forgets nothing. Each case runs in fresh processes, forked
from a server that has imported the libraries; memory counts from when the process group stands.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hpc.adapt.lora import attach, base_name
from hpc.bench.reuse_source import Shape, write
from hpc.bench.turns import Failed, Side, Turns, apart, memory_gib, serve
from hpc.config.train import AdapterTraining, TrainingBase
from hpc.errors import StageError
from hpc.model.build import empty_model, load_config, load_model
from hpc.reuse.stored import EXPERTS, StoredModel
from hpc.run.task import World
from hpc.train.allocator import give_back_freed_memory
from hpc.train.engine import Engine, start_process_group
from hpc.train.fragments import ExpertPlace, fill_weights, frozen_fragments

RANKS = 2
BIG = Shape(hidden=1024, expert=2048, layers=4, experts=16, vocabulary=16384)
"""0.44 billion parameters, nine tenths of them experts: 1.8 GB in the precision that it is loaded in."""
TOLERANCE = 1.1
CONSTANT_GIB = 0.1
"""Measured above `TOLERANCE` times the limit plus this is a miss: allocator, process group, code touched meanwhile."""


@dataclass(frozen=True)
class Layout:
    """How a model is spread over the ranks while it is loaded."""

    name: str
    expert_parallel: int
    zero_stage: int
    adapters: bool
    """Frozen under adapters (lora, relora), or all of it in training (finetune)."""


LAYOUTS = tuple(
    Layout(f"{'adapters' if adapters else 'all weights'}, {place}", ep, zero, adapters)
    for adapters in (True, False)
    for place, ep, zero in (("EP 1", 1, 1), ("EP 2", 2, 1), ("EP 2 + ZeRO-3", 2, 3), ("ZeRO-3", 1, 3))
)


@dataclass(frozen=True)
class Loaded:
    """A layout's outcome."""

    layout: str
    peak_gib: list[float]
    """Of each rank, above what it held before."""
    limit_gib: float
    seconds: float
    """Of the slowest rank."""
    checked: int
    """Elements of a rank compared with the file."""

    @property
    def holds(self) -> bool:
        """Whether every rank stayed within the limit."""
        return max(self.peak_gib) <= self.limit_gib * TOLERANCE + CONSTANT_GIB


def limit_bytes(experts: int, rest: int, tensor: int, layout: Layout, ranks: int = RANKS) -> int:
    """What a rank has to hold, fp32: experts/EP + the rest, or its part of both under ZeRO-3, and one tensor of the
    file on its way. Where all is trained also its part of the optimizer's copy and two moments, and what every update
    takes as well: under ZeRO-3 its gradients, else a gather of what it shares with others. experts, rest: elements."""
    kept = experts / layout.expert_parallel + rest
    part = (experts + rest) / ranks
    if layout.zero_stage == 3:
        kept = part
    if not layout.adapters:
        gathered = rest + (experts if layout.expert_parallel < ranks else 0)
        kept += 3 * part + (part if layout.zero_stage == 3 else gathered)
    return round(4 * kept) + tensor


def load(turns: Turns, case: Any) -> None:
    """A rank: build, fill, tell."""
    layout, folder, out = Layout(**case["layout"]), Path(case["folder"]), Path(case["out"])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start_process_group(World(rank, size, rank), "cpu")
    asked = {
        "batches": {"seq_len": 16, "micro_batch_size": 1, "tokens_per_step": 16 * size},
        "steps": 1, "optimizer": {"lr": 1e-3},
        "parallel": {"ranks_per_node": size, "expert_parallel_size": layout.expert_parallel,
                     "zero_stage": layout.zero_stage},
    }  # fmt: skip
    give_back_freed_memory()
    settings = (AdapterTraining if layout.adapters else TrainingBase).model_validate(asked)
    before = _begin()
    began = time.perf_counter()
    model: Any = empty_model(load_config(folder))
    if isinstance(settings, AdapterTraining):
        model = attach(model, settings, 1, rank)
    engine = Engine(model, settings, "cpu", filled_later=True)
    engine.fill(StoredModel(folder), base_name if layout.adapters else str)
    told = {"peak_gib": memory_gib("VmHWM") - before, "seconds": time.perf_counter() - began}
    out.with_name(f"{out.name}-{rank}").write_text(json.dumps({**told, "checked": _compare(engine, folder)}))
    turns.start()


def _begin() -> float:
    """Let the kernel forget the highest memory so far; returns what is held now, GiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_gib("VmRSS")


def _compare(engine: Engine, folder: Path) -> int:
    """Compare some of what this rank now holds with the file; returns how many elements. Raises StageError."""
    stored, count = StoredModel(folder), 0
    for fragment in [*frozen_fragments(engine.module, engine.place), *engine.moments().values()]:
        name = base_name(fragment.name)
        if name is None or ".experts.gate_up_proj" in name:
            continue
        name = name.replace(".mlp.router.gate.", ".mlp.gate.").replace(".experts.down_proj", ".experts.w2")
        held = fragment.values["weight"][:4096]
        wanted = torch.empty(len(held))
        stored.fill(name, fragment.start, wanted)
        if not torch.equal(held, wanted):
            raise StageError(f"{name} was not loaded as the file has it")
        count += len(held)
    return count


def alone(ours: bool, folder: Path) -> tuple[float, float]:
    """Seconds and peak GiB of loading the whole model in one process: by ranges, or by transformers."""
    give_back_freed_memory()
    before, began = _begin(), time.perf_counter()
    if ours:
        model = empty_model(load_config(folder)).requires_grad_(False)
        fill_weights(StoredModel(folder), frozen_fragments(model, ExpertPlace(0, 1)), str)
    else:
        model = load_model(folder)
    return time.perf_counter() - began, memory_gib("VmHWM") - before


def measure(
    environment: Mapping[str, str],
    shape: Shape = BIG,
    rounds: int = 3,
    layouts: tuple[Layout, ...] = LAYOUTS,
    say: Callable[[str], None] = lambda _: None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """All layouts, then both loaders in turns. Raises StageError for a layout that fails."""
    serve(["hpc.bench.reuse"], environment)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = Path(scratch) / "model"
        write(source, shape)
        stored = StoredModel(source)
        sizes = {name: torch.Size(wanted).numel() for name, wanted in stored.shapes.items()}
        experts = sum(size for name, size in sizes.items() if EXPERTS.search(name))
        rest = sum(sizes.values()) - experts
        tensor = 2 * max(size for name, size in sizes.items() if not EXPERTS.search(name))
        rows = []
        for layout in layouts:
            rows.append(_run(layout, source, limit_bytes(experts, rest, tensor, layout)))
            say(_row(rows[-1]))
        taken: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for turn in range(rounds):
            for ours in (True, False) if turn % 2 else (False, True):
                taken[ours].append(apart(alone, ours, source))
    one = {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in taken[ours]),
            "peak_gib": max(peak for _, peak in taken[ours]),
        }
        for name, ours in (("ranges", True), ("transformers", False))
        if taken[ours]
    }
    return {
        "experts_gib": 4 * experts / 2**30,
        "rest_gib": 4 * rest / 2**30,
        "tensor_gib": tensor / 2**30,
        "layouts": [{**asdict(row), "holds": row.holds, "ratio": max(row.peak_gib) / row.limit_gib} for row in rows],
        "one_process": one,
        "provenance": "measured: VmHWM of each rank above its VmRSS before the model is built; limit derived",
    }


def _run(layout: Layout, source: Path, limit: int) -> Loaded:
    out = source.with_name("told")
    try:
        side = Side(load, {"layout": asdict(layout), "folder": str(source), "out": str(out)}, RANKS)
    except Failed as failed:
        raise StageError(f"{layout.name}: {failed}") from None
    side.close()
    told = [json.loads(out.with_name(f"told-{rank}").read_text(encoding="utf-8")) for rank in range(RANKS)]
    peaks, checked = [one["peak_gib"] for one in told], min(one["checked"] for one in told)
    return Loaded(layout.name, peaks, limit / 2**30, max(one["seconds"] for one in told), checked)


def _row(row: Loaded) -> str:
    peaks = " / ".join(f"{peak:.2f}" for peak in row.peak_gib)
    ratio = max(row.peak_gib) / row.limit_gib
    return f"{row.layout:<28}{peaks:>13}{row.limit_gib:>9.2f}{ratio:>8.2f}{row.seconds:>8.1f}  {_word(row.holds)}"


def _word(holds: bool) -> str:
    return "held" if holds else "MISSED"


def show(found: dict[str, Any]) -> str:
    """The figures as a page; the rows of layouts were told while they came."""
    lines = [
        f"a checkpoint of {found['experts_gib']:.2f} GiB of experts and {found['rest_gib']:.2f} GiB of the rest, fp32;",
        f"columns: peak GiB of each of {RANKS} ranks, limit, ratio, seconds; {found['provenance']}",
        f"held: at most {TOLERANCE:g} x limit + {CONSTANT_GIB:g} GiB",
    ]
    for name, one in found["one_process"].items():
        lines.append(f"one process, {name:<14} {one['seconds']:6.2f} s (median), {one['peak_gib']:.2f} GiB at most")
    return "\n".join(lines)
