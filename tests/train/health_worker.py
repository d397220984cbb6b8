"""Run by test_health.py on every rank: train a small MoE through the one loop, with faults, and write what came of it.

    RANK=... WORLD_SIZE=... python -m tests.train.health_worker OUT SCENARIO ...

A scenario is a function below. Faults come from hooks on the model and from values set in a running loop; the code
under test has no switch for them.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hpc.config import Balance, Facility, Machine, Pretrain, Tracking
from hpc.data.loader import Share
from hpc.data.store import TokenStore, write_store
from hpc.errors import StageError, Stopped
from hpc.model.build import build_model, model_config
from hpc.run.directory import StageDirectory, read_jsonl
from hpc.run.task import Context, TaskFile, World
from hpc.train import loop
from hpc.train.engine import start_process_group
from hpc.train.watchdog import Watchdog

SEQ, MICRO, STEPS = 16, 2, 8
Row = dict[str, Any]


class Run:
    """One stage in a folder of its own; `attempt` may be called several times."""

    def __init__(self, folder: Path, name: str, world: World, *, layout: str = "1/1", accumulation: int = 1,
                 steps: int = STEPS, **health: Any) -> None:  # fmt: skip
        ep, zero, *kind = layout.split("/")
        self.world, self.directory = world, StageDirectory(folder / name)
        (self.directory.root / "tokens").mkdir(parents=True, exist_ok=True)
        stage = Pretrain.model_validate({
            "name": "pretrain", "kind": "pretrain", "needs": [],
            "train": {
                "model": {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "expert_size": 48,
                          "initializer_range": 0.15},
                "router": {"num_experts": 8, "top_k": 2},
                "batches": {"seq_len": SEQ, "micro_batch_size": MICRO,
                            "tokens_per_step": world.size * MICRO * SEQ * accumulation},
                "steps": steps, "optimizer": {"lr": 5e-3, "kind": kind[0] if kind else "adamw"},
                "schedule": {"kind": "constant"},
                "parallel": {"ranks_per_node": world.size, "expert_parallel_size": int(ep), "zero_stage": int(zero)},
                "checkpoint_every_steps": 4, "evaluate_every_steps": 100, "evaluate_tokens": 64,
                "health": {"report_every_steps": 4, "probe_every_steps": 0, **health},
            },
        })  # fmt: skip
        power = {"cpu_idle_w_per_core": 1, "cpu_busy_w_per_core": 1, "dram_w_per_gib": 1, "source": "made up"}
        machine = Machine.model_validate({"memory_gib_per_rank": 8, "peak_flops_per_rank": 1e9, "expected_mfu": 0.5,
                                          "power": power, "source": "made up"})  # fmt: skip
        self.task = TaskFile(run="r", run_directory=str(folder), stage=stage, stages=[stage], inputs={}, seed=1,
                             tracking=Tracking(wandb="disabled"), machine=machine, facility=Facility(),
                             ranks=world.size, nodes=1)  # fmt: skip
        tokens = np.random.default_rng(7).integers(0, 64, 4000)
        tokens = np.cumsum(tokens % 3) % 64  # something that can be learned
        prefix = self.directory.root / "tokens" / f"text-{world.rank}"
        write_store(prefix, [tokens.tolist()], 64)
        self.store = TokenStore(prefix)
        self.attempts = 0

    def attempt(self, change: Callable[["loop._Loop"], None] | None = None) -> dict[str, Any]:
        """Train; `change` may put hooks into the loop before it runs. Returns the outcome, rows and final weights."""
        self.attempts += 1
        settings = self.task.stage.train
        config = model_config(settings.model, settings.router, 64, 64, 0)
        context = Context(self.task, self.directory, self.world, self.attempts)
        job = loop.Job(
            model=build_model(config, seed=0), settings=settings, top_k=2, balance=Balance(aux_loss=0.01),
            train_tokens=(Share("text", self.store),), held_out_tokens=(self.store,),
            watchdog=Watchdog(self.directory, 1, self.world, settings.health.hang),
        )  # fmt: skip
        made = loop._Loop(context, job)
        self.loop = made
        if change:
            change(made)
        outcome, health = "done", {}
        try:
            health = made.run().health
        except (StageError, Stopped) as error:
            outcome = f"{type(error).__name__}: {error}"
        state = made.engine.state_in_transformers_layout()
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in sorted(state.items()))).hexdigest()
        dist.barrier()
        rows = read_jsonl(self.directory.metrics)
        return {
            "outcome": outcome,
            "health": health,
            "weights": digest,
            "record": vars(made.guard.record),
            "rows": rows,
        }


def on_place(place: int, act: Callable[[torch.Tensor], torch.Tensor], rank: int = 1) -> Callable[["loop._Loop"], None]:
    """Change what the model says on one rank, while it trains on the data of a place (step of an undisturbed run)."""

    def change(made: "loop._Loop") -> None:
        wanted = {batch.ids[:, :-1].tobytes() for batch in made.loader.micro_batches(place)[-1:]}

        def hook(module: Any, _args: Any, keywords: dict[str, Any], output: Any) -> Any:
            ids = keywords["input_ids"].numpy()
            if made.context.world.rank == rank and module.training and ids.tobytes() in wanted:
                output.logits = act(output.logits)
            return output

        made.engine.module.register_forward_hook(hook, with_kwargs=True)

    return change


def nan(logits: torch.Tensor) -> torch.Tensor:
    return logits * float("nan")


def huge(logits: torch.Tensor) -> torch.Tensor:
    return logits * 30.0


class Infinite(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(_context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> Any:
        return gradient * float("inf")


def without(places: list[list[int]]) -> Callable[["loop._Loop"], None]:
    """A run that never reads some places."""

    def change(made: "loop._Loop") -> None:
        made.guard.record.data_left_out = places

    return change


def losses(told: dict[str, Any], step: int = 0) -> list[float]:
    """Of the steps after `step`, as the last row of each says."""
    last = {row["step"]: row["loss"] for row in told["rows"] if "lr" in row}
    return [last[number] for number in sorted(last) if number > step]


FEW = ("1/1", "1/2", "2/3")
MORE = ("1/3", "2/1", "2/2", "2/1/muon", "1/2/muon", "1/3/muon")


def skip(folder: Path, world: World, layouts: tuple[str, ...] = FEW) -> Row:
    """A spike on rank 1 in the last micro-batch of step 6, in every layout; and a run that never saw that batch.

    The gradients are finite, so nothing but our decision keeps them from the weights.
    """
    found: Row = {}
    for layout in layouts:
        accumulation = 1 if "/1" in layout else 2
        name = layout.replace("/", "-")
        kept: list[str] = []
        run = Run(folder, f"skip-{name}", world, layout=layout, accumulation=accumulation, steps=8, window=4)

        def watch(made: "loop._Loop", kept: list[str] = kept) -> None:
            on_place(5, huge)(made)
            update = made._update

            def told(step: int, rate: float) -> Any:
                before = weights_of(made)
                answer = update(step, rate)
                kept.append("same" if weights_of(made) == before else "changed")
                return answer

            made._update = told

        bad = run.attempt(watch)
        clean = Run(folder, f"clean-{name}", world, layout=layout, accumulation=accumulation, steps=7, window=4)
        good = clean.attempt(without([[5, 6]]))
        found[layout] = {"bad": bad, "good": good, "kept": kept, "bad_losses": losses(bad, 6),
                         "good_losses": losses(good, 5)}  # fmt: skip
    return found


def skip_more(folder: Path, world: World) -> Row:
    """The other layouts."""
    return skip(folder, world, MORE)


def weights_of(made: "loop._Loop") -> str:
    """A digest of this rank's fp32 weights and moments, as the optimizer holds them."""
    parts = [value for fragment in made.engine._fragments() for value in fragment.values.values()]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def gradient(folder: Path, world: World) -> Row:
    """A finite loss with infinite gradients, everywhere or of an expert that only rank 1 holds."""

    def everywhere(made: "loop._Loop") -> None:
        on_place(5, Infinite.apply)(made)

    def one_expert(made: "loop._Loop") -> None:
        steps = [0]
        for name, parameter in made.engine.module.named_parameters():
            if name.endswith("layers.1.mlp.experts.w2") and world.rank == 1:

                def spoil(gradient: torch.Tensor) -> torch.Tensor:
                    steps[0] += 1
                    return gradient * float("inf") if steps[0] == 7 else gradient  # the first was the rehearsal

                parameter.register_hook(spoil)

    found = {zero: Run(folder, f"gradient-{zero}", world, layout=f"1/{zero}").attempt(everywhere) for zero in (1, 2, 3)}
    found["expert"] = Run(folder, "gradient-expert", world, layout="2/1").attempt(one_expert)
    return {str(key): value for key, value in found.items()}


def spike(folder: Path, world: World) -> Row:
    """Step 10 spikes. One run goes through; one stops at step 8 and must judge step 10 by the same eight losses."""

    def stop_at_7(made: "loop._Loop") -> None:
        on_place(9, huge)(made)
        update = made._update

        def told(step: int, rate: float) -> Any:
            made.context.stop.requested = step == 7 and world.rank == 1
            return update(step, rate)

        made._update = told

    health: Row = {"window": 8, "spike_sigma": 4.0, "steps": 11}
    through = Run(folder, "spike", world, **health).attempt(on_place(9, huge))
    run = Run(folder, "spike-resumed", world, **health)
    first = run.attempt(stop_at_7)
    return {"through": through, "first": first, "second": run.attempt(on_place(9, huge))}


def roll_back(folder: Path, world: World) -> Row:
    """A NaN at the place of step 7 leads back to step 4, past places 4 to 6; one at step 2 back to the start."""

    def twice(made: "loop._Loop") -> None:
        on_place(6, nan)(made)
        on_place(1, nan)(made)

    health: Row = {"on_bad_step": "roll_back"}
    once = Run(folder, "roll", world, **health).attempt(on_place(6, nan))
    both = Run(folder, "roll-twice", world, **health).attempt(twice)
    never = Run(folder, "roll-never", world, **{**health, "max_rollbacks": 1}).attempt(twice)
    left = Run(folder, "roll-left", world).attempt(without([[4, 7]]))
    left_twice = Run(folder, "roll-left-twice", world).attempt(without([[0, 2], [6, 7]]))
    return {"once": once, "left": left, "both": both, "left_twice": left_twice, "never": never}


def budget(folder: Path, world: World) -> Row:
    """Every step is bad."""

    def always(made: "loop._Loop") -> None:
        def hook(module: Any, _args: Any, output: Any) -> Any:
            output.logits = nan(output.logits) if module.training else output.logits
            return output

        made.engine.module.register_forward_hook(hook)

    return Run(folder, "budget", world, max_skipped=2).attempt(always)


def bits(folder: Path, world: World) -> Row:
    """The same curve with and without rehearsal and search for corruption."""
    found: Row = {}
    for layout, accumulation in (("1/1", 1), ("2/3", 2)):
        plain, watched = (
            Run(folder, f"{name}-{layout.replace('/', '-')}", world, layout=layout, accumulation=accumulation, steps=5,
                **health).attempt()
            for name, health in (("plain", {"rehearse": False}), ("watched", {"probe_every_steps": 2}))
        )  # fmt: skip
        found[layout] = {"plain": plain, "watched": watched}
    return found


def flip(folder: Path, world: World) -> Row:
    """One bit of one weight flips on the last rank, after the update of step 4."""

    def change(made: "loop._Loop") -> None:
        find = made._search

        def told(done: int) -> None:
            if world.rank == world.size - 1:
                weight = dict(made.engine.module.named_parameters())["model.layers.1.self_attn.k_proj.weight"]
                weight.data.view(torch.int32).view(-1)[5] ^= 1
            find(done)

        made._search = told

    layouts = ("1/1", "2/1") if world.size == 2 else ("1/1",)
    runs = {
        layout: Run(folder, f"flip-{world.size}-{layout.replace('/', '-')}", world, layout=layout, probe_every_steps=4)
        for layout in layouts
    }
    return {layout: run.attempt(change) for layout, run in runs.items()}


def slow(folder: Path, world: World) -> Row:
    """By its clock, rank 1 computes two seconds in every step and rank 0 one."""

    def change(made: "loop._Loop") -> None:
        looks = [0]

        def clock() -> float:
            looks[0] += 1
            return looks[0] * (1.0 + world.rank)

        made.clock = clock

    return Run(folder, "slow", world).attempt(change)


def asleep(folder: Path, world: World) -> Row:
    """Rank 1 sleeps in step 3: both end here, with an exit code, and never return."""

    def change(made: "loop._Loop") -> None:
        def hook(module: Any, *_: Any) -> None:
            if world.rank == 1 and made.guard.record.losses[1:]:
                time.sleep(600)

        made.engine.module.register_forward_hook(hook)
        made.watchdog = Watchdog.start(made.context, made.settings.health.hang)

    return Run(folder, "asleep", world, hang={"step_s": 3}).attempt(change)


SCENARIOS = (skip, skip_more, gradient, spike, roll_back, budget, bits, flip, slow, asleep)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("scenarios", nargs="+")
    chosen = parser.parse_args()
    rank = int(os.environ["RANK"])
    place = World(rank, int(os.environ["WORLD_SIZE"]), rank, int(os.environ["WORLD_SIZE"]), f"node-{rank}")
    start_process_group(place, "cpu")
    for scenario in SCENARIOS:
        if scenario.__name__ in chosen.scenarios:
            began = time.monotonic()
            told = scenario(chosen.out, place)
            print(scenario.__name__, f"{time.monotonic() - began:.1f} s", flush=True)
            if place.is_first:
                (chosen.out / f"{scenario.__name__}-{place.size}.json").write_text(json.dumps(told))
    dist.barrier()
    os._exit(0)
