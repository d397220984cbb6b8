"""A run directory written by hand: four nodes with counters, three attempts of the pretraining, a node that died, one
that reported nothing, a site that states its facility. Everything the report reads is there; nothing was trained.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from hpc.config import Facility, Machine, RunConfig
from hpc.config.machine import PowerModel
from hpc.run.receipt import list_files
from hpc.run.task import TaskFile

T0 = 1.79e9
COUNTER = "measured: Cray pm_counters, whole node"
FACILITY = {
    "other_it_fraction": 0.15,
    "pue": {"value": 1.1, "source": "site report", "year": 2025},
    "wue_l_per_kwh": {"value": 0.4, "source": "site report", "year": 2025},
    "carbon_g_per_kwh": {"value": 41.5, "source": "grid operator", "year": 2024},
    "embodied_g_per_node_hour": {"value": 23, "source": "vendor", "year": 2023},
    "location": "Edinburgh, UK",
    "source": "a test",
    "year": 2024,
}
MACHINE = Machine(
    memory_gib_per_rank=60, peak_flops_per_rank=1e14, expected_mfu=0.3, max_nodes=64, ranks_per_node=4,
    power=PowerModel(cpu_idle_w_per_core=1, cpu_busy_w_per_core=4, dram_w_per_gib=0.4, source="a test"),
    source="a test",
)  # fmt: skip
CHAIN = """
name: synthetic
tracking: {wandb: disabled}
stages:
  - {name: text, kind: prepare, sources: [{module: "pydoc_data.topics:topics"}], tokenizer: {vocab_size: 512}}
  - name: pretrain
    kind: pretrain
    needs: [text]
    train:
      model: {architecture: olmoe, hidden_size: 64, num_layers: 8, num_attention_heads: 4, expert_size: 64}
      router: {num_experts: 16, top_k: 2, aux_loss: 0.01}
      batches: {seq_len: 256, micro_batch_size: 4, tokens_per_step: 16384}
      steps: 300
      optimizer: {lr: 3e-3}
      parallel: {nodes: 4, ranks_per_node: 4, zero_stage: 1}
      checkpoint_every_steps: 100
  - name: lora
    kind: lora
    needs: [pretrain, text]
    train:
      rank: 8
      alpha: 16
      batches: {seq_len: 256, micro_batch_size: 4, tokens_per_step: 4096}
      steps: 40
      optimizer: {lr: 1e-3}
      parallel: {ranks_per_node: 4}
  - {name: merge, kind: merge, needs: [pretrain, lora]}
  - {name: quantize, kind: quantize, needs: [merge], group_size: 32}
  - {name: evaluate, kind: evaluate, needs: [pretrain, merge, quantize, text]}
  - {name: report, kind: report}
"""


class SyntheticRun:
    """Writes the records of stages into a run directory, one after the other."""

    def __init__(self, root: Path, facility: dict[str, Any] | None = None, **settings: Any) -> None:
        values = yaml.safe_load(CHAIN)
        values.update(settings)
        self.root, self.now = root, T0
        self.facility = Facility.model_validate(FACILITY if facility is None else facility)
        self.config = RunConfig.model_validate(values)
        self.random = random.Random(1)
        root.mkdir(parents=True)
        (root / "config.yaml").write_text(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))
        site = {
            "name": "synthetic",
            "description": "A made-up cluster",
            "hardware": {"gpus_per_node": 4, "gpu": "GPU X"},
        }
        (root / "site.yaml").write_text(yaml.safe_dump(site))

    def append(self, stage: str, file: str, *rows: dict[str, Any]) -> None:
        """Lines of a record."""
        folder = self.root / "stages" / stage
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / file).open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)

    def begin(self, stage: str, attempt: int, nodes: list[str], ranks: int, checkpoint: int = 0) -> None:
        """Start an attempt."""
        task = TaskFile(
            run=self.config.name, run_directory=str(self.root), stage=self.config.stage(stage),
            stages=self.config.stages, inputs={}, seed=1, tracking=self.config.tracking, machine=MACHINE,
            facility=self.facility, ranks=ranks, nodes=len(nodes),
        )  # fmt: skip
        row = {"event": "start", "attempt": attempt, "token": "t", "time": self.now, "host": nodes[0], "ranks": ranks,
               "job": "17", "restart": attempt - 1, "nodes": nodes, "checkpoint": checkpoint, "address": "a",
               "port": 1}  # fmt: skip
        self.append(stage, "attempts.jsonl", row)
        task.write(self.root / "stages" / stage / "task.json")
        self.append(stage, "timeline.jsonl", {"attempt": attempt, "time": self.now, "phase": "start", "step": None})

    def sample(self, stage: str, attempt: int, node: str, watts: float, seconds: float, *, ends: bool = True,
               source: str = COUNTER, every: float = 1.0, notes: tuple[str, ...] = (),
               unsure: float = 0.0) -> None:  # fmt: skip
        """What the sampler of a node writes over the coming seconds."""
        counter = {"name": "node", "scope": "node", "provenance": source}
        rows: list[dict[str, Any]] = [
            {
                "event": "start",
                "attempt": attempt,
                "host": node,
                "time": self.now,
                "counters": [counter],
                "notes": list(notes),
            }
        ]
        energy, steps = 0.0, int(seconds / every)
        for second in range(steps + 1):
            power = watts * (0.55 if second * every < 20 else 1) + self.random.gauss(0, 0.02 * watts)
            energy += power * every if second else 0.0
            rows.append(
                {"event": "end" if ends and second == steps else "sample", "attempt": attempt,
                 "time": self.now + second * every, "energy_j": {"node": energy}, "power_w": {"node": power},
                 "total_energy_j": energy, "total_power_w": power, **({"unsure_j": unsure} if unsure else {})}
            )  # fmt: skip
        self.append(stage, f"energy-{node}.jsonl", *rows)

    def step_rows(self, stage: str, attempt: int, first: int, last: int, seconds: float, joules: float,
                  tokens: int, layers: int = 8, experts: int = 16) -> None:  # fmt: skip
        """Rows of metrics of the steps first..last, spread over the coming seconds after a start of 20 s."""
        self.append(stage, "timeline.jsonl",
                    {"attempt": attempt, "time": self.now + 20, "phase": "productive", "step": None})  # fmt: skip
        count = last - first + 1
        for number in range(count):
            step = first + number
            load = [[1 + math.sin(expert + layer) * math.exp(-step / 120) * 0.9 for expert in range(experts)]
                    for layer in range(layers)]  # fmt: skip
            load = [[value / sum(row) for value in row] for row in load]
            entropy = [-sum(p * math.log(p) for p in row) / math.log(experts) for row in load]
            row = {
                "step": step, "tokens": step * tokens, "attempt": attempt,
                "time": self.now + 20 + (number + 1) * (seconds - 25) / count,
                "loss": 3 + 4 * math.exp(-step / 80) + self.random.gauss(0, 0.05), "lr": 3e-3,
                "energy_j": joules + (number + 1) / count * joules * 0.5, "tokens_per_s": 9000.0,
                "router_load": load, "router_entropy": entropy, "router_min_entropy": min(entropy),
                "router_max_over_mean": max(max(row) for row in load) * experts,
            }  # fmt: skip
            if step % 50 == 0:
                row["heldout_loss"] = 3.1 + 4 * math.exp(-step / 80)
            self.append(stage, "metrics.jsonl", row)

    def end(self, stage: str, attempt: int, seconds: float, outcome: str = "done", message: str = "", node: str = "n1",
            lost: str = "") -> None:  # fmt: skip
        """End an attempt after some seconds, with a verdict as the job gives it."""
        self.now += seconds
        if lost:
            self.append(stage, "attempts.jsonl", {"event": "node", "attempt": attempt, "time": self.now, "node": lost})
        else:
            code = {"done": 0, "stopped": 130}.get(outcome, 6)
            row = {"event": "end", "attempt": attempt, "rank": 0, "time": self.now, "outcome": outcome,
                   "exit_code": code, "message": message, "is_crash": False, "node": node}  # fmt: skip
            self.append(stage, "attempts.jsonl", row)
        if outcome != "done" or lost:
            self.append(stage, "attempts.jsonl", {"event": "verdict", "attempt": attempt, "time": self.now,
                                                  "action": "requeue", "reason": message, "checkpoint": 0})  # fmt: skip

    def receipt(self, stage: str, metrics: dict[str, Any], attempts: int, seconds: float, size: int = 1000,
                inputs: dict[str, str] | None = None) -> None:  # fmt: skip
        """The artifact of a stage and its receipt."""
        folder = self.root / "stages" / stage
        (folder / "artifact").mkdir(parents=True, exist_ok=True)
        (folder / "artifact" / "config.json").write_text(json.dumps({"model_type": "olmoe", "stage": stage}))
        (folder / "artifact" / "model.safetensors").write_bytes(b"w" * size)
        content = {
            "stage": stage, "kind": self.config.stage(stage).kind, "config": {}, "inputs": inputs or {},
            "files": list_files(folder / "artifact"), "metrics": metrics,
            "provenance": dict.fromkeys(metrics, "measured: in a test"), "energy": {}, "seconds": seconds,
            "code": {"greenmoe": "0.1.0", "commit": "abc", "torch": "2.13.0"}, "attempts": attempts, "census": {},
        }  # fmt: skip
        (folder / "receipt.json").write_text(json.dumps(content))

    def simple(self, stage: str, metrics: dict[str, Any], seconds: float = 60, size: int = 1000) -> None:
        """A stage that took one attempt on one node."""
        self.begin(stage, 1, ["n1"], 4)
        self.sample(stage, 1, "n1", 400, seconds)
        if self.config.stage(stage).kind == "lora":
            self.step_rows(stage, 1, 1, 40, seconds, 1e4, 4096)
        self.end(stage, 1, seconds)
        self.receipt(stage, metrics, 1, seconds, size)
        self.now += 5


def quality(value: float) -> dict[str, Any]:
    """Figures of one model on the one token set."""
    return {"text": {"loss": math.log(value), "perplexity": value, "bits_per_byte": 1.5, "tokens": 5000}}


def pretraining(run: SyntheticRun, scale: float = 1.0) -> None:
    """Three attempts on four nodes: n3 dies in the first, the second is preempted after n4's sampler wrote nothing."""
    tokens = 16384
    first, second, third = 260 * scale, 200 * scale, 420 * scale
    run.begin("pretrain", 1, ["n1", "n2", "n3", "n4"], 16)
    for number, node in enumerate(("n1", "n2", "n4")):
        run.sample("pretrain", 1, node, 430 + 30 * number, first)
    run.sample("pretrain", 1, "n3", 520, 0.7 * first, ends=False)
    run.step_rows("pretrain", 1, 1, 130, first, 2e5, tokens)
    run.end("pretrain", 1, first, "failed", "node n3 was lost; on from the checkpoint of step 100", lost="n3")
    run.now += 5400
    run.begin("pretrain", 2, ["n1", "n2", "n4", "n5"], 16, checkpoint=100)
    for number, node in enumerate(("n1", "n2", "n5")):
        run.sample("pretrain", 2, node, 430 + 30 * number, second)
    run.step_rows("pretrain", 2, 101, 200, second, 5e5, tokens)
    run.end("pretrain", 2, second, "stopped", "preempted; checkpoint at step 200 is safe")
    run.now += 900
    run.begin("pretrain", 3, ["n1", "n2", "n4", "n5"], 16, checkpoint=200)
    for number, node in enumerate(("n1", "n2", "n4", "n5")):
        run.sample("pretrain", 3, node, 430 + 30 * number, third)
    run.step_rows("pretrain", 3, 201, 300, third, 9e5, tokens)
    run.end("pretrain", 3, third)
    figures = {"heldout_loss": 3.15, "heldout_perplexity": 23.3, "train_loss": 3.1, "steps": 300,
               "tokens": 300 * tokens, "total_params": 63_000_000, "active_params": 14_000_000, "tokens_per_s": 9000.0,
               "seq_len": 256,
               "replayed_steps": 30}  # fmt: skip
    run.receipt("pretrain", figures, 3, third, size=126_000)
    run.now += 5


def whole_run(root: Path, **settings: Any) -> SyntheticRun:
    """All stages but the report."""
    run = SyntheticRun(root, **settings)
    run.simple("text", {"unigram_loss": 6.2, "unigram_perplexity": 492.7, "vocab_size": 512})
    pretraining(run)
    run.simple(
        "lora", {"heldout_loss_before": 3.4, "heldout_loss": 3.2, "tokens": 163840, "trainable_params": 1000}, 90
    )
    run.simple("merge", {"max_abs_logit_difference": 1e-6}, size=126_000)
    run.simple("quantize", {"expert_bits_per_weight": 4.13, "bits": 4}, size=41_000)
    models = {"pretrain": quality(23.3), "merge": quality(22.1), "quantize": quality(22.4)}
    evil = "<script>alert(1)</script>"
    samples = {"pretrain": [{"prompt": evil, "text": evil + " and more"}]}
    run.simple("evaluate", {"models": models, "samples": samples})
    return run
