"""A stage without a model: real files, a real mirror, and steps that cost nothing. Also a program, to be killed.

python -m tests.tracking.trainer STAGE FIRST LAST THEN MODE PATIENCE: rows of steps FIRST..LAST, then THEN: 'hang', or
an outcome; 'failed' waits for the file STAGE/go.
"""

import sys
import time
from pathlib import Path
from typing import Any

from hpc.run.attempts import Job, record_end, record_start
from hpc.run.directory import StageDirectory, append_jsonl
from hpc.run.receipt import Receipt, list_files, write_receipt
from hpc.tracking import mirror
from hpc.tracking.ticket import Ticket


def ticket(root: Path, mode: str, produces: str = "model") -> Ticket:
    """Of the stage in `root`."""
    return Ticket(id=f"id-{root.name}", project="p", entity=None, group="chain", name=f"chain/{root.name}",
                  kind="pretrain", produces=produces, has_steps=True, mode=mode, config={"run": "chain"})  # fmt: skip


def row(step: int, attempt: int) -> dict[str, Any]:
    """What a training stage logs: every figure tells step and attempt."""
    return {
        "step": step, "tokens": step * 100, "attempt": attempt, "time": 1000.0 + step + attempt / 8,
        "loss": 9 - step / 64, "lr": None, "router_load": [[0.25, 0.75], [0.5, 0.5]], "router_entropy": [0.75, 1.0],
        "tokens_per_s": 50.0 + attempt, "node_power_w": {"n1": 100.0, "n2": 200.5},
        "energy_j": 300.5 * step + 10 * attempt,
    }  # fmt: skip


def begin(root: Path) -> int:
    """Announce an attempt; returns its number."""
    root.mkdir(parents=True, exist_ok=True)
    return record_start(StageDirectory(root), Job("t", nodes=("n1", "n2")), 4, "127.0.0.1", 1).number


def write_rows(root: Path, first: int, last: int, attempt: int) -> None:
    """Append the rows of some steps."""
    for step in range(first, last + 1):
        append_jsonl(root / "metrics.jsonl", row(step, attempt))


def make_receipt(root: Path, inputs: dict[str, str]) -> Receipt:
    """Finish the stage: one file, two figures."""
    (root / "artifact").mkdir(exist_ok=True)
    (root / "artifact" / "weights").write_text(root.name)
    metrics = {"heldout_loss": 5.5, "perplexity": None}
    receipt = Receipt(root.name, "pretrain", {}, inputs, list_files(root / "artifact"), metrics, {}, {"energy_j": 7.0},
                      {}, 3.0, 2)  # fmt: skip
    write_receipt(StageDirectory(root), receipt)
    return receipt


def main() -> None:
    """An attempt."""
    root, first, last, mode, patience = Path(sys.argv[1]), *sys.argv[2:4], *sys.argv[5:]
    then: Any = sys.argv[4]
    mirror.FINISH_ONLINE_S = float(patience)
    number = begin(root)
    sight = mirror.Mirror.start(ticket(root, mode), root, number)
    write_rows(root, int(first), int(last), number)
    while then == "hang" or (then == "failed" and not (root / "go").exists()):
        time.sleep(0.1)
    if then == "done":
        make_receipt(root, {})
    sight.finish(then)
    record_end(StageDirectory(root), number, 0, then)


if __name__ == "__main__":
    main()
