"""Run by test_four_bit.py on every rank: LoRA on a base in four bits in several layouts, and what came of it.

    RANK=... WORLD_SIZE=... python -m tests.adapt.packed OUT FOLDER EP/ZERO/BITS/RECOMPUTE[/save|/resume] ...

Six steps; BITS is 4 or 32. `save` keeps a checkpoint after the third; `resume` begins there.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc.adapt.lora import attach, base_name
from hpc.bench.turns import memory_gib
from hpc.config.train import AdapterTraining
from hpc.model.build import empty_model, load_config
from hpc.model.packing import bits_per_weight, packed_matrices
from hpc.reuse.stored import StoredModel
from hpc.run.task import World
from hpc.train.checkpoint import Checkpoints
from hpc.train.corruption import bit_sum, fingerprint
from hpc.train.engine import Engine, start_process_group

STEPS, SAVED = 6, 3
IDS = torch.arange(32).view(2, 16) * 5 % 61


def settings_for(case: str, world: World) -> AdapterTraining:
    ep, zero, bits, recompute, *_ = case.split("/")
    return AdapterTraining.model_validate(
        {
            "rank": 2, "alpha": 4, "base_bits": 4 if bits == "4" else None, "recompute": recompute,
            "batches": {"seq_len": 15, "micro_batch_size": 2 // world.size, "tokens_per_step": 30},
            "steps": STEPS, "optimizer": {"lr": 3e-3},
            "parallel": {"ranks_per_node": world.size, "expert_parallel_size": int(ep), "zero_stage": int(zero)},
        }
    )  # fmt: skip


def trained(case: str, folder: Path, world: World) -> dict[str, Any]:
    settings = settings_for(case, world)
    engine = Engine(
        attach(empty_model(load_config(folder)), settings, 1, world.rank), settings, "cpu", filled_later=True
    )
    engine.fill(StoredModel(folder), base_name)
    *layout, last = case.split("/")
    kept = Checkpoints(folder.parent / f"kept-{'-'.join(layout)}", world, {}, keep=9)
    begin, losses = 0, []
    if last == "resume":
        found = kept.newest()
        assert found is not None
        engine.load(found[0])
        begin = found[1]
    share = IDS.chunk(world.size)[world.rank]
    for step in range(begin, STEPS):
        loss = engine.loss(share[:, :-1], share[:, 1:])
        engine.backward(loss)
        engine.step(3e-3)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world.size)
        if last == "save" and step + 1 == SAVED:
            kept.save(step + 1, 1, engine.snapshot(to_host=True))
            kept.wait()
    sums = torch.zeros((), dtype=torch.int64)  # over the bits of experts: each rank has its own
    matrices = list(packed_matrices(engine.module))
    for packed in matrices:
        if ".experts." in packed.name:
            sums += bit_sum(packed.matrix.tensors[0])
    if settings.parallel.expert_parallel_size > 1:
        dist.all_reduce(sums)
    names = [name for name in fingerprint(engine, IDS)[0] if "mlp.experts" in name or "base_layer" in name]
    return {
        "losses": losses, "bits": bits_per_weight(engine.module), "expert_codes": int(sums),
        "packed": len(matrices), "watched": len(names),
        "parameters": [[name, p.numel()] for name, p in engine.module.named_parameters() if not p.requires_grad],
        "checkpoint_bytes": engine.checkpoint_bytes, "peak_gib": memory_gib("VmHWM"),
        "exact": {name: value.double().sum().item() for name, value in engine.trained_state().items()},
    }  # fmt: skip


if __name__ == "__main__":
    out, source, cases = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    place = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    start_process_group(place, "cpu")
    told = {name: trained(name, source, place) for name in cases}
    if place.is_first:
        out.write_text(json.dumps(told))
    dist.barrier()
    os._exit(0)
