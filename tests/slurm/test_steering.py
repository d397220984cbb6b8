"""A chain on a real Slurm as a person steers it: failures upstream, gates, retry, cancel, many jobs, refusals."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpc.run.directory import read_jsonl
from slurm import commands
from slurm.devcluster.cluster import Cluster
from slurm.devcluster.files import Layout
from slurm.status import chain_status
from tests.conftest import Launch
from tests.slurm.conftest import SMALL, Chain, make_cluster, slurm, submit

pytestmark = pytest.mark.slurm

CHAIN = """\
name: steer
tracking: {{wandb: disabled}}
stages:
  - name: text
    kind: prepare
    sources: [{{files: ["{folder}/good.jsonl"]}}]
    tokenizer: {{vocab_size: 300}}
    held_out_fraction: 0.2
  - {{name: second, kind: prepare, needs: [text], sources: [{{files: ["{folder}/second.jsonl"]}}]}}
  - {{name: third, kind: prepare, needs: [second], sources: [{{files: ["{folder}/good.jsonl"]}}]}}
  - name: gated
    kind: prepare
    needs: [text]
    gate: tokens_train > 1e9
    sources: [{{files: ["{folder}/good.jsonl"]}}]
  - {{name: behind, kind: prepare, needs: [gated], sources: [{{files: ["{folder}/good.jsonl"]}}]}}
  - {{name: side, kind: prepare, needs: [text], sources: [{{files: ["{folder}/good.jsonl"]}}]}}
"""
GOOD = "\n".join(json.dumps({"text": f"Document {number} says {'word ' * (number % 7 + 3)}."}) for number in range(400))

NINE_NODES = ("--set", "stages.pretrain.train.parallel={nodes: 9, ranks_per_node: 1}",
              "--set", "stages.pretrain.train.batches.tokens_per_step=2304")  # fmt: skip


def states(chain: Chain) -> dict[str, str]:
    return {stage.name: stage.state for stage in chain_status(chain.run).stages}


def text_of(chain: Chain, name: str) -> str:
    return next(stage.text for stage in chain_status(chain.run).stages if stage.name == name)


def over(chain: Chain) -> Callable[[], bool]:
    return lambda: chain_status(chain.run).is_over


def test_a_failure_and_a_missed_gate_hold_up_what_depends_on_them_and_nothing_else(
    healthy: Cluster, tmp_path: Path, launch: Launch
) -> None:
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "second.jsonl").write_text("this is no JSON\n")
    chain = submit(tmp_path, CHAIN.format(folder=tmp_path))
    chain.wait(over(chain), "end of the chain", 120)

    assert states(chain) == {
        "text": "done", "second": "failed", "third": "held up", "gated": "gate missed", "behind": "held up",
        "side": "done",
    }  # fmt: skip
    assert "second.jsonl:1: not a JSON object" in text_of(chain, "second")
    assert text_of(chain, "third") == "not run: it needs second (failed)"
    assert re.match(r"gate 'tokens_train > 1e9' missed: text has tokens_train = \d+", text_of(chain, "gated"))
    for name in ("third", "behind"):
        assert chain.starts(name) == 0, "nothing downstream ran"
    assert chain.starts("second") == 1, "bad data are not tried again"

    shown = launch("status", chain.run.root)
    assert shown.returncode == 6
    assert "next: python launch.py logs" in shown.stdout
    logs = launch("logs", chain.run.root, "second")
    assert "attempt 1 failed first on rank 0" in logs.stdout.splitlines()[0]
    assert "DataError" in logs.stdout

    (tmp_path / "second.jsonl").write_text(GOOD)
    again = launch("retry", chain.run.root, "second")
    assert again.returncode == 0, again.stderr
    assert re.findall(r"^(\w+): submitted", again.stdout, re.MULTILINE) == ["second", "third"]
    chain.wait(over(chain), "end of the retry", 120)
    assert states(chain)["third"] == "done"
    assert chain.attempts("second")[-1]["action"] == "done"

    lowered = ["--set", "stages.gated.gate=tokens_train > 10", "--site", "devcluster", "--set", f"run_root={tmp_path}"]
    assert launch("submit", tmp_path / "chain.yaml", *lowered).returncode == 0
    chain.wait(over(chain), "end after the gate was lowered", 120)
    assert set(states(chain).values()) == {"done"}
    assert launch("status", chain.run.root).returncode == 0
    idle = launch("submit", tmp_path / "chain.yaml", *lowered)
    assert "submitted as job" not in idle.stdout
    assert "done already: text" in idle.stdout


def hundred(folder: Path) -> str:
    """One stage and 99 that need it, each a job of its own; the nodes have room for 16."""
    stage = '  - {{name: part-{number}, kind: prepare, needs: [text], sources: [{{files: ["{folder}/good.jsonl"]}}]}}\n'
    head = CHAIN.split("  - {{name: second")[0].format(folder=folder)
    return head + "".join(stage.format(number=number, folder=folder) for number in range(99))


def test_a_hundred_jobs_in_one_chain_submit_twice_cancel_resume(
    healthy: Cluster, tmp_path: Path, launch: Launch
) -> None:
    (tmp_path / "good.jsonl").write_text(GOOD)
    slurm("scontrol", "update", "partitionname=main", "state=down")  # takes jobs, starts none
    try:
        began = time.monotonic()
        chain = submit(tmp_path, hundred(tmp_path))
        assert time.monotonic() - began < 15
        jobs = [job for row in read_jsonl(chain.run.submissions) if row["event"] == "submit" for job in row["jobs"]]
        assert len(set(jobs)) == 100

        began = time.monotonic()
        shown = launch("status", chain.run.root)
        assert time.monotonic() - began < 2
        assert shown.stdout.count("part-") >= 99
        assert "the partition is down" in shown.stdout
        assert "for text" in shown.stdout

        submit(tmp_path, hundred(tmp_path))
        alive = [job for job in commands.queue() if job.is_alive]
        assert len(alive) == 100, "a second submission adds nothing"

        changed = launch("submit", tmp_path / "chain.yaml", "--site", "devcluster", "--set", f"run_root={tmp_path}",
                         "--set", "stages.text.held_out_fraction=0.3")  # fmt: skip
        assert changed.returncode == 2
        assert "is on its way as job" in changed.stderr

        cancelled = launch("cancel", chain.run.root)
        assert cancelled.stdout.count("cancelled job") == 100
        chain.wait_until_idle()
        assert set(states(chain).values()) <= {"cancelled", "held up"}

        assert launch("resume", chain.run.root).returncode == 0
        assert len([job for job in commands.queue() if job.is_alive]) == 100
    finally:
        slurm("scontrol", "update", "partitionname=main", "state=up")
    chain.wait(lambda: states(chain)["part-0"] in ("running", "done"), "the first part at work", 60)
    launch("cancel", chain.run.root)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ([*NINE_NODES], 2, "parallel.nodes = 9, but the site offers 4"),
        ([*NINE_NODES, "--site-set", "machine.max_nodes=9"], 8, "Slurm would refuse stage 'pretrain'"),
        (["--site-set", "slurm.partition=nope"], 8, "invalid partition specified: nope"),
        (["--site-set", "slurm.account_required=true"], 2, "--site-set slurm.account=YOURS"),
        (["--set", "stages.pretrain.resources.time_limit_min=100000"], 2, "the site allows 1440"),
        (["--set", "stages.pretrain.resources.memory_per_node=9000G"], 8, "Slurm would refuse stage 'pretrain'"),
        (["--set", 'name="x\\n#SBATCH --wrap=id"'], 2, "name"),
        (["--set", 'stages.pretrain.name="a; id"'], 2, "name"),
        (["--set", 'stages.pretrain.resources.partition="main\\nid"'], 2, "resources.partition"),
        (["--site-set", "confirm.node_hours=0.001"], 2, "Add --yes"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_anything_is_submitted(
    healthy: Cluster, tmp_path: Path, launch: Launch, arguments: list[str], code: int, expected: str
) -> None:
    config = tmp_path / "chain.yaml"
    config.write_text(SMALL.format(steps=8, resources="{}"))
    result = launch("submit", config, "--site", "devcluster", "--set", f"run_root={tmp_path}", *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert len(result.stderr.strip().splitlines()) == 1
    assert expected in result.stderr
    assert not list(tmp_path.glob("*/submissions.jsonl"))
    assert not [job for job in commands.queue() if job.is_alive]


def test_a_folder_that_a_job_script_cannot_carry_is_refused(healthy: Cluster, tmp_path: Path, launch: Launch) -> None:
    config = tmp_path / "chain.yaml"
    config.write_text(SMALL.format(steps=8, resources="{}"))
    result = launch("submit", config, "--site", "devcluster", "--set", f"run_root={tmp_path}/a b")
    assert result.returncode == 2
    assert "may reach a job script" in result.stderr


@pytest.fixture(params=[False, True], ids=["without sacct", "with sacct"])
def forgetful(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, bool]]:
    """A small cluster whose controller forgets a job two seconds after its end, with and without a database."""
    found = make_cluster(lambda root, mode: Layout(root, mode, 1, accounting=request.param, min_job_age_s=2))
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    yield found, request.param
    found.down()


def test_the_end_of_a_forgotten_job_is_known_from_sacct_and_told_as_unknown_without(
    forgetful: tuple[Cluster, bool], tmp_path: Path
) -> None:
    _, has_accounting = forgetful
    (tmp_path / "good.jsonl").write_text(GOOD)
    chain = submit(tmp_path, CHAIN.split("  - {{name: second")[0].format(folder=tmp_path))
    slurm("scancel", chain.submitted("text"))  # not through launch.py: no record but Slurm's

    def is_forgotten() -> bool:
        return not any(job.job == chain.submitted("text") for job in commands.queue())

    chain.wait(is_forgotten, "the controller to forget the job", 120)
    status = chain_status(chain.run)
    if has_accounting:
        assert (status.stages[0].state, "was cancelled" in status.stages[0].text) == ("cancelled", True)
    else:
        assert status.stages[0].state == "unknown"
        assert any("sacct does not answer here" in note for note in status.notes)
