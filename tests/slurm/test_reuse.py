"""A model that exists, adapted to two tasks, merged, quantized and compared as Slurm jobs: each of them killed once,
and every artifact and figure equal to those of a chain left alone."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurm.devcluster.cluster import Cluster
from slurm.status import chain_status
from tests.conftest import ROOT
from tests.slurm.conftest import Chain, rank_process, slurm, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 8
LORA = ["lora-modern", "lora-python"]
KILLED = ["smollm2", "text-modern", *LORA, "merge-modern", "merge-python", "quantize", "evaluate"]
PASSING = (
    "tokens_per_s", "peak_memory_bytes", "slowest_rank", "rank_step_median_s", "rank_step_p99_s",
    "rank_step_p99_over_median", "replayed_steps",
)  # fmt: skip
"""What may differ between two runs: times, memory, and what was done again."""


def recipe() -> str:
    """The recipe for SmolLM2, shorter."""
    chain = yaml.safe_load((ROOT / "configs/reuse-smollm2.yaml").read_text())
    chain["tracking"] = {"wandb": "disabled"}
    for stage in chain["stages"]:
        if stage["name"] == "lora":
            batches = {"seq_len": 128, "micro_batch_size": 1, "tokens_per_step": 512}
            stage["train"].update(
                batches=batches, steps=STEPS, checkpoint_every_steps=2, evaluate_every_steps=STEPS, evaluate_tokens=1024
            )
        if stage["name"] == "evaluate":
            stage.update(tokens=2048, seq_len=128, generate_tokens=4)
    return yaml.safe_dump(chain, sort_keys=False)


def kill(chain: Chain, stage: str) -> None:
    """End the running attempt of a stage: trainings lose a rank without a word, the others are requeued."""
    job = chain.submitted(stage)
    if stage not in LORA:
        slurm("scontrol", "requeue", job)
        return
    rank_process(1, job).kill()


def result(chain: Chain, stage: str) -> tuple[dict[str, str], dict[str, Any]]:
    """SHA-256 of every file of the artifact that holds weights, tokens or a vocabulary; and the figures."""
    receipt = json.loads(chain.run.stage(stage).receipt.read_text())
    files = {file["path"]: file["sha256"] for file in receipt["files"] if not file["path"].endswith((".md", ".json"))}

    def steady(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: steady(one) for name, one in value.items() if name not in PASSING}
        return value

    return files, steady(receipt["metrics"])


def test_each_stage_of_the_smollm2_chain_survives_a_kill_with_the_same_bits(healthy: Cluster, tmp_path: Path) -> None:
    chains = []
    for name in ("quiet", "killed"):
        (tmp_path / name).mkdir()
        chain = submit(tmp_path / name, recipe())
        waiting = [] if name == "quiet" else list(KILLED)
        deadline = time.monotonic() + 1500
        while not chain_status(chain.run).is_over:
            for stage in list(waiting):
                training = stage in LORA
                if chain.step(stage) >= STEPS // 2 + 1 if training else chain.starts(stage) >= 1:
                    time.sleep(0 if training else 1)
                    kill(chain, stage)
                    waiting.remove(stage)
            assert time.monotonic() < deadline, chain.story()
            time.sleep(0.2)
        assert chain_status(chain.run).is_done, chain.story()
        assert not waiting
        chains.append(chain)

    quiet, killed = chains
    for stage in KILLED:
        assert (quiet.starts(stage), killed.starts(stage)) == (1, 2), stage
        assert result(quiet, stage) == result(killed, stage), stage
    for stage in LORA:
        assert quiet.curve(stage) == killed.curve(stage)
        begun = [row["checkpoint"] for row in killed.attempts(stage) if row["event"] == "start"]
        assert begun[1] >= STEPS // 2, "it went on from a checkpoint"
        metrics = result(quiet, stage)[1]
        assert metrics["heldout_loss"] < metrics["heldout_loss_before"]
