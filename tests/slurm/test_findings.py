"""What the doctor says about what it saw."""

from dataclasses import replace
from typing import Any

import pytest

from slurm.findings import Finding, Seen, examine
from slurm.site import load_site

SITE = load_site("devcluster", ["slurm.cpus_per_task=2"])
UNKNOWN = load_site("devcluster", ["slurm.preemption=null"])
VERSIONS = {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}


def rank(number: int, **more: Any) -> dict[str, Any]:
    return {
        "rank": number, "size": 4, "node": f"n{number // 2 + 1}", "local_rank": number % 2, "python": "3.11.7",
        "machine": "x86_64", "umask": "022", "cpus": 2, "threads": "1", "accelerators": 0, "versions": VERSIONS,
        "backend": "gloo", "interface": "eth0", "connect_s": 0.5, "clock_ahead_s": 0.001, "rename_seen_s": 0.01,
        "all_to_all_bytes_per_s": 1e9, "write_bytes_per_s": 1e8, "power_counters": ["pm_counters"], "power_notes": [],
        "job_requeue": True, "wandb": True, "signal_heard": True, "step": "", **more,
    }  # fmt: skip


GOOD = Seen(
    site=SITE,
    settings={"KillWait": "30 sec", "SlurmctldParameters": "preempt_send_user_signal", "MinJobAge": "300 sec"},
    partition={"PartitionName": "main", "PreemptMode": "REQUEUE", "GraceTime": "60"},
    has_accounting=True,
    free_bytes=10**12,
    free_inodes=10**7,
    stale_locks=(),
    checkpoint_bytes=4e8,
    ranks=[rank(number) for number in range(4)],
    expected_ranks=4,
    job="7",
)


def on(topic: str, seen: Seen) -> Finding:
    return next(finding for finding in examine(seen) if finding.topic == topic)


def test_a_good_site_is_well_in_every_respect() -> None:
    assert [finding for finding in examine(GOOD) if finding.level != "ok"] == []
    assert "takes 1.0 s" in on("saving", GOOD).what


@pytest.mark.parametrize(
    ("topic", "level", "expected", "changes"),
    [
        ("ranks", "problem", "execve", {"ranks": [], "log": ["slurmstepd: execve(): /x: No such file"]}),
        ("ranks", "problem", "ranks [3] are silent", {"ranks": GOOD.ranks[:3]}),
        ("ranks", "problem", "rank 2 on n2, process group: timeout",
         {"ranks": [*GOOD.ranks[:2], rank(2, failed="timeout", step="process group"), rank(3)]}),
        ("ranks", "problem", "rank 3 ended in 'all-to-all'", {"ranks": [*GOOD.ranks[:3], rank(3, step="all-to-all")]}),
        ("versions", "problem", "n2 differs from n1",
         {"ranks": [*GOOD.ranks[:3], rank(3, versions={**VERSIONS, "torch": "2.12.0"})]}),
        ("versions", "problem", "not installed on the nodes: deepspeed",
         {"ranks": [rank(n, versions={**VERSIONS, "deepspeed": None}) for n in range(4)]}),
        ("clocks", "note", "n2 is +3.0 s from n1", {"ranks": [*GOOD.ranks[:3], rank(3, clock_ahead_s=3.0)]}),
        ("cores", "note", "a rank may use 1 cores, the site asks for 2",
         {"ranks": [rank(n, cpus=1) for n in range(4)]}),
        ("space", "problem", "only 1 GiB", {"free_bytes": 2**30}),
        ("space", "problem", "inodes", {"free_inodes": 10}),
        ("space", "problem", "only 931 GiB", {"checkpoint_bytes": 6e11}),
        ("stale locks", "note", "/x/lock", {"stale_locks": ["/x/lock"]}),
        ("signals", "problem", "rank 1 on n1 did not hear USR2",
         {"ranks": [rank(0), rank(1, signal_heard=False), rank(2), rank(3)]}),
        ("requeue", "problem", "switched it off", {"ranks": [rank(n, job_requeue=False) for n in range(4)]}),
        ("preemption", "note", "CANCEL", {"partition": {"PreemptMode": "CANCEL"}, "site": UNKNOWN}),
        ("preemption", "note", "Slurm says CANCEL, the site file requeue", {"partition": {"PreemptMode": "CANCEL"}}),
        ("preemption", "note", "preempt_send_user_signal off", {"settings": {"KillWait": "30 sec"}}),
        ("preemption", "ok", "off in partition p",
         {"partition": {"PreemptMode": "OFF", "PartitionName": "p"}, "site": UNKNOWN}),
        ("saving", "problem", "signal 30 s before the limit", {"checkpoint_bytes": 4e10}),
        ("saving", "note", "GraceTime 5 s is shorter",
         {"checkpoint_bytes": 4e9, "partition": {"PreemptMode": "REQUEUE", "GraceTime": "00:00:05"}}),
        ("saving", "note", "save time unknown", {"checkpoint_bytes": None}),
        ("sacct", "note", "forgets a job after 300 sec", {"has_accounting": False}),
        ("power counters", "note", "none can be read (energy_uj: permission denied)",
         {"ranks": [rank(n, power_counters=[], power_notes=["energy_uj: permission denied"]) for n in range(4)]}),
        ("power counters", "ok", "gpu0 on every node; without a counter: cpu, dram",
         {"ranks": [rank(n, power_counters=["gpu0"], power_unmeasured=["cpu", "dram"]) for n in range(4)]}),
        ("W&B", "note", "no way", {"ranks": [rank(n, wandb=False, wandb_reason="timed out") for n in range(4)]}),
    ],
)  # fmt: skip
def test_what_is_not_well_is_named_with_its_reason_and_a_way_out(
    topic: str, level: str, expected: str, changes: dict[str, Any]
) -> None:
    found = on(topic, replace(GOOD, **changes))
    assert (found.level, expected in found.what) == (level, True), found
    if level != "ok":
        assert found.do
