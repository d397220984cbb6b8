"""What every rank of a made-up stage does on a real cluster: announce the attempt, start the node's sampler, wait.

    python stand_in.py STAGE_FOLDER SECONDS

It keeps the records that `slurm.worker` keeps, without anything that takes long to import.
"""

import os
import socket
import sys
import time
from pathlib import Path

from hpc.energy.sampler import start_sampler, stop_sampler
from hpc.run.attempts import Job, record_end, record_start, wait_for_start
from hpc.run.directory import StageDirectory

MODEL = '{"cpu_idle_w_per_core": 1, "cpu_busy_w_per_core": 4, "dram_w_per_gib": 0.5, "source": "made up"}'


def main() -> None:
    directory, seconds = StageDirectory(Path(sys.argv[1])), float(sys.argv[2])
    rank, ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    nodes = tuple(f"n{number + 1}" for number in range(ranks))
    job = Job("made-up", os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0")), nodes)
    attempt = record_start(directory, job, ranks, "", 0) if rank == 0 else wait_for_start(directory, job)
    sampler = start_sampler(directory.root, socket.gethostname(), os.getpid(), attempt.number, MODEL)
    time.sleep(seconds)
    stop_sampler(sampler)
    record_end(directory, attempt.number, rank, "done", node=socket.gethostname())


if __name__ == "__main__":
    main()
