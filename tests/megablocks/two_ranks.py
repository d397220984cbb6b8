"""Run by test_megablocks.py on each of two ranks: expert parallelism, ours and MegaBlocks' own. Rank 0 writes OUT.

RANK=... WORLD_SIZE=2 python -m tests.megablocks.two_ranks OUT
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc.evaluate.loss import token_losses
from hpc.model.build import build_model, model_config
from hpc.run.task import World
from hpc.train import engine as ours
from tests.megablocks import cpu_ops
from tests.megablocks.layers import dmoe
from tests.train.exactness import SgdEngine, data, settings_for

STEPS, CASE = 3, "2/1/free/1/qwen3_moe/sgd/plain"


def train(world: World) -> dict[str, Any]:
    """Losses, final weights and grouped GEMMs of our engine with experts on two ranks, computed by MegaBlocks."""
    ours.check_available = lambda *_: None  # it asks for the GPU that the stand-ins are for
    settings = settings_for(CASE, world.size).model_copy(update={"expert_compute": "megablocks"})
    model = build_model(model_config(settings.model, settings.router, 64, 64, 0), seed=0)
    engine = SgdEngine(model, settings, "cpu")
    losses = []
    for batch in data()[:STEPS]:
        mine = batch.chunk(world.size)[world.rank]
        loss = token_losses(engine.forward(mine[:, :-1]), mine[:, 1:]).mean()
        engine.backward(loss)
        engine.step(settings.optimizer.lr)
        mean = loss.detach() / world.size
        dist.all_reduce(mean)
        losses.append(float(mean))
    return {"losses": losses, "weights": engine.state_in_transformers_layout(), "calls": cpu_ops.calls}


def its_own_parallelism(world: World) -> dict[str, Any]:
    """Output and expert gradients of MegaBlocks' layer with its experts on two ranks; see `layers.dmoe`."""
    layer, x = dmoe(group=dist.group.WORLD)
    y = layer(x.chunk(world.size)[world.rank].contiguous())
    y.square().sum().backward()
    outputs = [torch.empty_like(y) for _ in range(world.size)]
    dist.all_gather(outputs, y.detach())
    gradient = layer.experts.mlp.v1.grad
    gradients = [torch.empty_like(gradient) for _ in range(world.size)]
    dist.all_gather(gradients, gradient)
    return {"y": torch.cat(outputs), "v1": torch.cat(gradients)}


if __name__ == "__main__":
    place = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    ours.start_process_group(place, "cpu")
    told = {"engine": train(place), "dmoe": its_own_parallelism(place)}
    if place.is_first:
        torch.save(told, Path(sys.argv[1]))
    dist.barrier()
    os._exit(0)
