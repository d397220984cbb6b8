"""Run by test_relora.py on every rank: cycles of ReLoRA in many layouts, and what came of them.

    RANK=... WORLD_SIZE=... python -m tests.adapt.cycles OUT FOLDER EP/ZERO/PRUNE[/save|/resume] ...

Three cycles of three steps. `save` keeps a checkpoint after the second cycle's end; `resume` begins there.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc.adapt import relora
from hpc.adapt.lora import attach, base_name, train_unadapted
from hpc.adapt.relora import adapted_matrices, restart
from hpc.config.train import ReloraTraining
from hpc.errors import StageError
from hpc.model.build import empty_model, load_config
from hpc.reuse.stored import StoredModel
from hpc.run.task import World
from hpc.train.checkpoint import Checkpoints
from hpc.train.engine import Engine, start_process_group

EVERY, CYCLES, RANK = 3, 3, 2
IDS = torch.arange(32).view(2, 16) * 5 % 61


def settings_for(case: str, world: World) -> ReloraTraining:
    ep, zero, prune, *_ = case.split("/")
    return ReloraTraining.model_validate(
        {
            "rank": RANK, "alpha": 4, "prune": prune, "prune_ratio": 0.75,
            "batches": {"seq_len": 15, "micro_batch_size": 2 // world.size, "tokens_per_step": 30},
            "steps": EVERY * CYCLES, "optimizer": {"lr": 3e-3},
            "schedule": {"kind": "jagged_cosine", "restart_every_steps": EVERY, "restart_warmup_steps": 1},
            "parallel": {"ranks_per_node": world.size, "expert_parallel_size": int(ep), "zero_stage": int(zero)},
        }
    )  # fmt: skip


def logits_of(engine: Engine) -> torch.Tensor:
    engine.module.eval()
    with torch.no_grad():
        found = engine.forward(IDS[:1]).clone()
    engine.module.train()
    return found


def cycles(case: str, folder: Path, world: World) -> dict[str, Any]:
    settings = settings_for(case, world)
    model = attach(empty_model(load_config(folder)), settings, 1, world.rank)
    train_unadapted(model)
    engine = Engine(model, settings, "cpu", changes_frozen=True, filled_later=True)
    engine.fill(StoredModel(folder), base_name)
    ep, zero, prune, *more = case.split("/")
    kept = Checkpoints(folder.parent / f"kept-{ep}-{zero}-{prune}", world, {}, keep=9)
    begin, losses, jumps, forgotten, bs = 0, [], [], [], []
    if more == ["resume"]:
        found = kept.newest()
        assert found is not None
        engine.load(found[0])
        begin = found[1]
    share = IDS.chunk(world.size)[world.rank]
    for step in range(begin, settings.steps):
        loss = engine.loss(share[:, :-1], share[:, 1:])
        engine.backward(loss)
        engine.step(3e-3)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world.size)
        if (step + 1) % EVERY == 0:
            before = logits_of(engine)
            forgotten.append(restart(engine, step + 1, 1, settings.prune, settings.prune_ratio)["optimizer_forgot"])
            jumps.append(float((logits_of(engine) - before).abs().max()))
            bs.append(max(float(matrix.B.detach().abs().sum()) for matrix in adapted_matrices(engine.module)))
        if more == ["save"] and step + 1 == 2 * EVERY:
            kept.save(step + 1, 1, engine.snapshot(to_host=True))
            kept.wait()
    state = {
        known: value for name, value in engine.state_in_transformers_layout().items() if (known := base_name(name))
    }
    before_training = StoredModel(folder)
    ranks: dict[str, int] = {}
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.down_proj"):
        first = before_training.tensor(name.replace("down_proj", "w2"))
        difference = (state[name] - first)[-1] if "experts" in name else state[name] - first
        ranks[name] = int(torch.linalg.matrix_rank(difference, atol=1e-5)) if world.is_first else 0
    weights = {name: float(value.double().norm()) for name, value in state.items()}
    exact = {name: value.double().sum().item() for name, value in state.items()}
    return {"losses": losses, "jumps": jumps, "forgotten": forgotten, "bs": bs, "ranks": ranks, "weights": weights,
            "exact": exact}  # fmt: skip


def refused(case: str, folder: Path, world: World) -> str:
    """What a restart says when the optimizer keeps its moments, or loses those of other parameters."""
    settings = settings_for(case, world)
    model = attach(empty_model(load_config(folder)), settings, 1, world.rank)
    train_unadapted(model)
    engine = Engine(model, settings, "cpu", changes_frozen=True, filled_later=True)
    engine.fill(StoredModel(folder), base_name)
    engine.backward(engine.loss(IDS[:, :-1], IDS[:, 1:]))
    engine.step(3e-3)
    forget = relora._forget

    def damaged(engine: Engine, *rest: Any) -> None:
        if not case.endswith("stale"):
            forget(engine, *rest)
            engine.moments()["model.norm.weight"].values["exp_avg"].zero_()

    relora._forget = damaged
    try:
        restart(engine, EVERY, 1, settings.prune, settings.prune_ratio)
    except StageError as error:
        return str(error)
    finally:
        relora._forget = forget
    return "accepted"


if __name__ == "__main__":
    out, source, cases = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    place = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    start_process_group(place, "cpu")
    told: dict[str, Any] = {
        name: (refused if name.endswith(("stale", "others")) else cycles)(name, source, place) for name in cases
    }
    if place.is_first:
        out.write_text(json.dumps(told))
    dist.barrier()
    os._exit(0)
