"""A prepare stage in a process of its own, so that a test can kill it. Run by test_prepare.py.

python -m tests.data.preparation FOLDER WORKERS SOURCE...     chunks of 100 kB; prints the stage's metrics as JSON
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc.config import Facility, Machine, Prepare, Source, Tracking
from hpc.data import sources
from hpc.run.directory import StageDirectory
from hpc.run.task import Context, TaskFile, World
from hpc.stages import prepare

VOCAB_SIZE = 400
MACHINE = Machine.model_validate(
    {"memory_gib_per_rank": 1, "peak_flops_per_rank": 1e9, "expected_mfu": 0.1, "source": "none",
     "power": {"cpu_idle_w_per_core": 1, "cpu_busy_w_per_core": 2, "dram_w_per_gib": 0, "source": "none"}}
)  # fmt: skip


def read_documents(source: Source) -> Iterator[str]:
    """Documents of a source in their order, without blank ones."""
    return (text for chunk in sources.chunks([source]) for text in sources.read_chunk(chunk))


def prepared(folder: Path, workers: int, names: list[str]) -> dict[str, Any]:
    """Do the stage in `folder` as the worker does: the artifact of a killed attempt is removed first."""
    sources.CHUNK_BYTES = 100_000
    return prepare_sources(folder, [{"files": [name]} for name in names], workers)


def prepare_sources(folder: Path, asked: list[dict[str, Any]], workers: int = 1) -> dict[str, Any]:
    """Do a stage with these sources in `folder`; returns its metrics, its artifact is in stages/text/artifact."""
    stage = Prepare.model_validate(
        {"kind": "prepare", "name": "text", "sources": asked, "workers": workers,
         "tokenizer": {"vocab_size": VOCAB_SIZE, "train_bytes": 200_000}, "held_out_fraction": 0.2}
    )  # fmt: skip
    task = TaskFile(
        run="run", run_directory=str(folder), stage=stage, stages=[stage], inputs={}, seed=0, tracking=Tracking(),
        machine=MACHINE, facility=Facility(), ranks=1, nodes=1,
    )  # fmt: skip
    directory = StageDirectory(folder / "stages/text")
    directory.root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory.artifact, ignore_errors=True)
    return prepare.run(Context(task, directory, World(), attempt=1)).metrics


if __name__ == "__main__":
    print(json.dumps(prepared(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
