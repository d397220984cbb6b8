"""Run by test_stored.py on every rank: fill a model from a checkpoint in many layouts and tell what came of it.

    RANK=... WORLD_SIZE=... python -m tests.reuse.filling OUT FOLDER EP/ZERO[/lora] ...

Memory is the growth of this process's resident pages until the weights are filled in, the optimizer's states not
touched.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc.adapt.lora import attach, base_name, save_adapter
from hpc.config.train import AdapterTraining, TrainingBase
from hpc.model.build import empty_model, load_config
from hpc.reuse.stored import StoredModel
from hpc.run.task import World
from hpc.train.engine import Engine, start_process_group


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fill(case: str, folder: Path, world: World) -> dict[str, Any]:
    """What a case's state is like after loading, and after three updates."""
    ep, zero, *more = case.split("/")
    asked = {
        "batches": {"seq_len": 16, "micro_batch_size": 1, "tokens_per_step": 16 * world.size},
        "steps": 4, "optimizer": {"lr": 1e-3},
        "parallel": {"ranks_per_node": world.size, "expert_parallel_size": int(ep), "zero_stage": int(zero)},
    }  # fmt: skip
    settings = (AdapterTraining if more else TrainingBase).model_validate(asked)
    before = resident_bytes()
    model: Any = empty_model(load_config(folder))
    if isinstance(settings, AdapterTraining):
        model = attach(model, settings, 1, world.rank)
    engine = Engine(model, settings, "cpu", filled_later=True)
    engine.fill(StoredModel(folder), base_name if more else str)
    grown = resident_bytes() - before
    ids = torch.arange(16).view(1, 16)
    engine.module.eval()
    with torch.no_grad():
        logits = engine.forward(ids).flatten().tolist()
    engine.module.train()
    for _ in range(3):
        engine.backward(engine.loss(ids[:, :-1], ids[:, 1:]))
        engine.step(3e-3)
    with torch.no_grad():
        after = float(engine.loss(ids[:, :-1], ids[:, 1:]))
    if isinstance(settings, AdapterTraining):
        state = engine.trained_state()
        if world.is_first:
            save_adapter(
                state, settings, folder.parent / f"adapter-{ep}-{zero}", has_experts="llama" not in folder.name
            )
    return {"logits": logits, "grown": grown, "after": after}


if __name__ == "__main__":
    out, source, cases = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    place = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    start_process_group(place, "cpu")
    told = {name: fill(name, source, place) for name in cases}
    gathered: list[Any] = [None] * place.size
    dist.all_gather_object(gathered, {name: case["grown"] for name, case in told.items()})
    if place.is_first:
        out.write_text(
            json.dumps({name: {**case, "grown": [rank[name] for rank in gathered]} for name, case in told.items()})
        )
    dist.barrier()
    os._exit(0)
