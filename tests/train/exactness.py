"""Run by test_exactness.py on every rank: train a small MoE in many layouts and write the curves as JSON.

    RANK=... WORLD_SIZE=... python -m tests.train.exactness OUT [--first N --last N --load DIR --save DIR] CASE ...

A case is `EP/ZERO/CLIP/ACCUMULATION/ARCHITECTURE/OPTIMIZER/AUX`, further keys of the training as `/KEY=VALUE`
behind it. Weights, data and global batch are the same in all.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from hpc.config.train import Training
from hpc.model.build import build_model, model_config
from hpc.model.routing import RouterProbe, update_biases
from hpc.run.task import World
from hpc.train.checkpoint import Checkpoints
from hpc.train.engine import Engine, start_process_group

STEPS, BATCH, SEQ = 8, 8, 16
ROUTERS = {
    "deepseek_v3": {"num_experts": 8, "top_k": 3, "num_shared_experts": 1, "num_groups": 4, "top_groups": 2,
                    "scaling_factor": 2.5, "bias_update_rate": 0.02},
}  # fmt: skip


class SgdEngine(Engine):
    """Plain gradient descent: it shows a wrong scale of gradients, which Adam hides."""

    def _optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        adam = super()._optimizer(model)
        for group in adam.param_groups:
            group["weight_decay"] = 0.0
        return torch.optim.SGD(adam.param_groups, lr=self.settings.optimizer.lr)


def settings_for(case: str, ranks: int) -> Training:
    ep, zero, clip, accumulation, architecture, optimizer, _, *keys = case.split("/")
    return Training.model_validate(
        {
            "model": {
                "architecture": architecture, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4,
                "expert_size": 48, "initializer_range": 0.15,
                **({"num_dense_layers": 1} if architecture == "deepseek_v3" else {}),
            },
            "router": ROUTERS.get(architecture, {"num_experts": 8, "top_k": 2}),
            "batches": {"seq_len": SEQ, "micro_batch_size": BATCH // ranks // int(accumulation),
                        "tokens_per_step": BATCH * SEQ},
            "steps": STEPS,
            "optimizer": {"kind": "muon" if optimizer == "muon" else "adamw", "lr": 0.3 if optimizer == "sgd" else 5e-3,
                          "gradient_clipping": 0.3 if clip == "clip" else 1e9},
            **{key: yaml.safe_load(value) for key, value in (pair.split("=") for pair in keys)},
            "parallel": {"ranks_per_node": ranks, "expert_parallel_size": int(ep), "zero_stage": int(zero)},
        }
    )  # fmt: skip


def data() -> torch.Tensor:
    """Token ids (STEPS, BATCH, SEQ + 1), the same everywhere."""
    generator = torch.Generator().manual_seed(7)
    first = torch.randint(0, 64, (STEPS, BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (STEPS, BATCH, 1), generator=generator)
    return (first + stride * torch.arange(SEQ + 1)) % 64


def run(case: str, world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Losses and gradient norms of a case, and a fingerprint of its final weights."""
    settings = settings_for(case, world.size)
    model = build_model(model_config(settings.model, settings.router, 64, 64, 0), seed=0)
    engine = (SgdEngine if "/sgd/" in case else Engine)(model, settings, options.device)
    probe = RouterProbe(engine.module)
    share = BATCH // world.size
    losses, norms, began = [], [], time.monotonic()
    if options.load:
        for parameter in engine.module.parameters():  # what is not loaded must be seen
            parameter.data.fill_(0.123)
        found = Checkpoints(options.load, world, {}, keep=9).newest()
        assert found is not None
        engine.load(found[0])
    for step in data()[options.first : options.last]:
        mine = step[world.rank * share : (world.rank + 1) * share]
        total = torch.zeros((), device=options.device)
        for part in mine.chunk(settings.gradient_accumulation_steps):
            loss = engine.loss(part[:, :-1], part[:, 1:])
            heard = probe.collect()
            total += loss.detach() / settings.gradient_accumulation_steps
            engine.backward(loss + 0.01 * heard.aux_loss if "/aux" in case else loss)
            engine.step(settings.optimizer.lr)
        if settings.router.bias_update_rate:
            update_biases(engine.module, heard.counts_LE, settings.router.bias_update_rate)
        dist.all_reduce(total)
        losses.append(float(total) / world.size)
        norms.append(engine.gradient_norm)
    if options.save:
        saved = Checkpoints(options.save, world, {}, keep=9)
        saved.save(options.last, 1, engine.snapshot(to_host=True))
        saved.wait()
    engine.module.eval()
    logits = engine.forward(data()[0, :1, :-1]).detach().flatten().tolist() if options.save else None
    state = engine.state_in_transformers_layout()
    weights = {name: [float(value.double().sum()), float(value.double().norm())] for name, value in state.items()}
    memory = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
    return {"losses": losses, "norms": norms, "weights": weights, "logits": logits, "peak_bytes": memory,
            "seconds": time.monotonic() - began}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=4)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    chosen = parser.parse_args()
    place = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    start_process_group(place, chosen.device)
    told = {name: run(name, place, chosen) for name in chosen.cases}
    if place.is_first:
        chosen.out.write_text(json.dumps(told))
    dist.barrier()
    os._exit(0)
