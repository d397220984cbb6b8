"""From what the doctor saw to what a person should know: what was found, why it matters, what to do. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slurm.site import Scheduler, Site

Level = Literal["ok", "note", "problem"]
LOW_SPACE_BYTES = 10 * 2**30
LOW_INODES = 100_000
LARGE_SKEW_S = 1.0


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    topic: str
    level: Level
    what: str
    why: str = ""
    do: str = ""


@dataclass(frozen=True)
class Seen:
    """Everything that was looked at."""

    site: Site
    settings: Mapping[str, str]
    """`scontrol show config`."""
    partition: Mapping[str, str]
    """`scontrol show partition`."""
    has_accounting: bool
    free_bytes: int
    free_inodes: int
    stale_locks: Sequence[str]
    checkpoint_bytes: float | None
    """Of the largest training stage of the chain that was named."""
    ranks: Sequence[Mapping[str, Any]]
    """One row per rank, as `slurm.probe` writes it."""
    expected_ranks: int
    job: str
    queued_s: float | None = None
    log: Sequence[str] = ()
    """Lines of the job's error log."""


def examine(seen: Seen) -> list[Finding]:
    """All findings, in the order of the questions that a newcomer has."""
    meeting = _ranks(seen)
    found = [meeting, *([_versions(seen.ranks)] if seen.ranks else [])]
    if meeting.level == "ok":
        found += [_network(seen.ranks), _files(seen.ranks), _clocks(seen.ranks), *_cores(seen), _signals(seen.ranks)]
        found += [_requeue(seen), _counters(seen), _wandb(seen)]
    return [*found, _space(seen), _locks(seen), _preemption(seen), *_saving(seen), _accounting(seen)]


def _ranks(seen: Seen) -> Finding:
    why = "every rank of a stage has to start, find the shared folder and reach all others"
    rows, topic = seen.ranks, "ranks"
    if not rows:
        tail = "; ".join(seen.log[:2]) or "its log is empty"
        return Finding(topic, "problem", f"no rank of job {seen.job} told anything: {tail}", why,
                       "is the site's interpreter there on compute nodes, and run_root shared?")  # fmt: skip
    failed = next((row for row in rows if row.get("failed")), None)
    if failed:
        return Finding(topic, "problem", f"rank {failed['rank']} on {failed['node']}, {failed['step']}: "
                       f"{failed['failed']}", why, _remedy(str(failed["step"])))  # fmt: skip
    stuck = [row for row in rows if row.get("step")]
    missing = sorted(set(range(seen.expected_ranks)) - {int(row["rank"]) for row in rows})
    if missing or stuck:
        where = f"rank {stuck[0]['rank']} ended in {stuck[0]['step']!r}" if stuck else f"ranks {missing} are silent"
        return Finding(topic, "problem", where, why, _remedy(str(stuck[0]["step"])) if stuck else "see the job's log")
    nodes = dict.fromkeys(str(row["node"]) for row in rows)
    waited = f", started after {seen.queued_s:.0f} s in the queue" if seen.queued_s is not None else ""
    return Finding(topic, "ok", f"{len(rows)} ranks on {', '.join(nodes)} reach each other{waited}")


def _remedy(step: str) -> str:
    remedies = {
        "meeting on the shared file system": "put run_root on a file system that all nodes mount (site: scratch)",
        "network interface": "name the fast network in the site (network_interface: ib0, hsn0, ...), or null",
        "process group": "name the fast network in the site: network_interface: ib0, hsn0, ...",
        "all-to-all": "check network_interface, and NCCL settings under environment; NCCL_DEBUG=INFO tells more",
        "shared file system": "take another file system for run_root, or ask the site about its caching",
        "Slurm from a compute node": "requeueing needs scontrol and scancel on compute nodes: ask the site",
    }
    return remedies.get(step, "see the job's log")


def _versions(ranks: Sequence[Mapping[str, Any]]) -> Finding:
    distinct = {
        (row["python"], row["machine"], *(f"{k} {v}" for k, v in sorted(row["versions"].items()))) for row in ranks
    }
    first = ranks[0]
    if len(distinct) > 1:
        odd = next(row for row in ranks if (row["python"], row["versions"]) != (first["python"], first["versions"]))
        return Finding("versions", "problem", f"{odd['node']} differs from {first['node']}",
                       "ranks with different libraries fail late, or compute different things",
                       "use one environment on a shared file system, or the same container")  # fmt: skip
    missing = [name for name, found in first["versions"].items() if found is None]
    if missing:
        return Finding("versions", "problem", f"not installed on the nodes: {', '.join(missing)}", "stages need them",
                       "pip install -e . there, or name the right environment (site: python)")  # fmt: skip
    shown = ", ".join(f"{name} {first['versions'][name]}" for name in ("torch", "deepspeed", "transformers"))
    return Finding("versions", "ok", f"the same on all nodes: Python {first['python']}, {shown}")


def _network(ranks: Sequence[Mapping[str, Any]]) -> Finding:
    first, slowest = ranks[0], min(float(row["all_to_all_bytes_per_s"]) for row in ranks)
    what = (
        f"{first['backend']} all-to-all over {first['interface']}: {slowest / 1e9:.2f} GB/s per rank (measured, "
        f"slowest rank); connected in {max(float(row['connect_s']) for row in ranks):.1f} s"
    )
    return Finding("network", "ok", what)


def _files(ranks: Sequence[Mapping[str, Any]]) -> Finding:
    together = sum(float(row["write_bytes_per_s"]) for row in ranks)
    slowest = max(float(row["rename_seen_s"]) for row in ranks)
    umasks = ", ".join(sorted({str(row["umask"]) for row in ranks}))
    what = (
        f"{together / 1e6:,.0f} MB/s together (measured, synced); renames seen by all ranks within "
        f"{1000 * slowest:.0f} ms; umask {umasks} (runs are written with 077)"
    )
    return Finding("shared files", "ok", what)


def _clocks(ranks: Sequence[Mapping[str, Any]]) -> Finding:
    ahead = {str(row["node"]): float(row["clock_ahead_s"]) for row in ranks}
    worst = max(ahead, key=lambda node: abs(ahead[node]))
    if abs(ahead[worst]) > LARGE_SKEW_S:
        return Finding("clocks", "note", f"{worst} is {ahead[worst]:+.1f} s from {ranks[0]['node']}",
                       "energy of several nodes is laid over one time axis, and attempts are ordered by time",
                       "tell the site: NTP does not run there")  # fmt: skip
    return Finding("clocks", "ok", f"nodes agree within {abs(ahead[worst]):.3f} s")


def _cores(seen: Seen) -> list[Finding]:
    row = seen.ranks[0]
    asked = seen.site.slurm.cpus_per_task if seen.site.slurm else None
    found = []
    if asked and int(row["cpus"]) < asked:
        found.append(Finding("cores", "note", f"a rank may use {row['cpus']} cores, the site asks for {asked}",
                             "threads that share a core are slower than fewer threads",
                             "lower slurm.cpus_per_task, or add --cpu-bind to slurm.srun_options"))  # fmt: skip
    wanted = seen.site.slurm.gpus_per_node if seen.site.slurm else None
    if wanted and int(row["accelerators"]) < wanted:
        found.append(Finding("accelerators", "problem", f"{row['accelerators']} on {row['node']}, not {wanted}",
                             "each rank needs one", "check slurm.gpus_per_node and slurm.gpu_request"))  # fmt: skip
    return found or [Finding("cores", "ok", f"{row['cpus']} cores and {row['threads']} threads per rank")]


def _space(seen: Seen) -> Finding:
    space = f"{seen.free_bytes / 2**30:,.0f} GiB and {seen.free_inodes:,} inodes are free below run_root"
    why = "a full disk ends a stage; checkpoints need room for two of their kind"
    do = "free some, ask for more quota, or --run-root DIR"
    needed = max(LOW_SPACE_BYTES, 2 * (seen.checkpoint_bytes or 0))
    if seen.free_bytes < needed or 0 < seen.free_inodes < LOW_INODES:
        return Finding("space", "problem", f"only {space}", why, do)
    quota = f"; quota as the site states it: {seen.site.quota}" if seen.site.quota else ""
    return Finding("space", "ok", f"{space}{quota}")


def _locks(seen: Seen) -> Finding:
    if seen.stale_locks:
        return Finding("stale locks", "note", f"{seen.stale_locks[0]}"
                       + (f" and {len(seen.stale_locks) - 1} more" if len(seen.stale_locks) > 1 else ""),
                       "a build of a torch extension that was killed leaves a lock on which later ones wait for ever; "
                       "our jobs build in a folder of their own, other programs of yours do not",
                       f"rm {' '.join(seen.stale_locks[:3])}")  # fmt: skip
    return Finding("stale locks", "ok", "no lock of a killed extension build lies around")


def _signals(ranks: Sequence[Mapping[str, Any]]) -> Finding:
    deaf = [row for row in ranks if not row["signal_heard"]]
    if deaf:
        return Finding("signals", "problem", f"rank {deaf[0]['rank']} on {deaf[0]['node']} did not hear USR2",
                       "before its end a job is told to save by this signal",
                       "a wrapper between srun and Python (site: python) must pass signals on: use `exec`")  # fmt: skip
    return Finding("signals", "ok", "USR2 sent from a compute node reaches all ranks")


def _requeue(seen: Seen) -> Finding:
    if not seen.ranks[0]["job_requeue"]:
        return Finding("requeue", "problem", "Slurm switched it off for our job",
                       "preemption, time limits and dead nodes lead back to the queue, not to the end of the chain",
                       "ask the site; without it use `launch.py resume` after each end")  # fmt: skip
    return Finding("requeue", "ok", "allowed, and compute nodes may call scontrol")


def _preemption(seen: Seen) -> Finding:
    mode = seen.partition.get("PreemptMode", seen.settings.get("PreemptMode", "unknown"))
    told = "preempt_send_user_signal" in seen.settings.get("SlurmctldParameters", "")
    grace = _seconds(seen.partition.get("GraceTime", "0"))
    stated = seen.site.slurm.preemption if seen.site.slurm else None
    if stated and not mode.upper().startswith(stated.upper()):
        return Finding("preemption", "note", f"Slurm says {mode}, the site file {stated}",
                       "what a preemption costs is other than planned", "correct slurm.preemption")  # fmt: skip
    if mode.upper().startswith("OFF"):
        return Finding("preemption", "ok", f"off in partition {seen.partition.get('PartitionName', '?')}")
    what = f"{mode}, GraceTime {grace:.0f} s, preempt_send_user_signal {'on' if told else 'off'}"
    if "CANCEL" in mode.upper():
        return Finding("preemption", "note", what, "a preempted job is cancelled, not requeued",
                       "after a preemption run `launch.py resume`, or choose a partition with requeue")  # fmt: skip
    if not told or grace == 0:
        return Finding("preemption", "note", what, "a preempted job gets no time to save: it goes on from its newest "
                       "checkpoint", "keep checkpoint_every_steps as low as you can afford to lose")  # fmt: skip
    return Finding("preemption", "ok", what)


def _saving(seen: Seen) -> list[Finding]:
    rates = [float(row["write_bytes_per_s"]) for row in seen.ranks if row.get("write_bytes_per_s")]
    scheduler = seen.site.slurm or Scheduler()
    kill_wait, warning = _seconds(seen.settings.get("KillWait", "0")), scheduler.signal_before_end_s
    if not rates or seen.checkpoint_bytes is None:
        return [Finding("saving", "note", f"signal {warning} s before the limit, KillWait {kill_wait:.0f} s; "
                        "save time unknown", "", "give a chain: doctor --config CONFIG")]  # fmt: skip
    save = seen.checkpoint_bytes / sum(rates)
    what = (
        f"a checkpoint of {seen.checkpoint_bytes / 2**30:.2f} GiB takes {save:.1f} s (derived from the "
        f"measured rate); signal {warning} s before the limit, KillWait {kill_wait:.0f} s"
    )
    grace = _seconds(seen.partition.get("GraceTime", "0"))
    if save > warning:
        return [Finding("saving", "problem", what, "a stage that reaches its limit could not save in time",
                        f"--site-set slurm.signal_before_end_s={int(3 * save)}, or use more ranks")]  # fmt: skip
    if 0 < grace < save:
        return [Finding("saving", "note", f"{what}; GraceTime {grace:.0f} s is shorter",
                        "a preempted job loses what it did since its newest checkpoint",
                        "lower checkpoint_every_steps")]  # fmt: skip
    return [Finding("saving", "ok", what)]


def _accounting(seen: Seen) -> Finding:
    if seen.has_accounting:
        return Finding("sacct", "ok", "answers")
    forgotten = seen.settings.get("MinJobAge", "300 sec")
    return Finding("sacct", "note", f"does not answer here; the controller forgets a job after {forgotten}",
                   "later, `status` knows how a job ended only from what it wrote itself",
                   "nothing, or ask the site for accounting")  # fmt: skip


def _counters(seen: Seen) -> Finding:
    per_node = {str(row["node"]): row["power_counters"] for row in seen.ranks if "power_counters" in row}
    notes = [note for row in seen.ranks for note in row.get("power_notes", [])]
    if per_node and all(per_node.values()):
        lacking = sorted({part for row in seen.ranks for part in row.get("power_unmeasured", [])})
        without = f"; without a counter: {', '.join(lacking)}" if lacking else ""
        return Finding("power counters", "ok", f"{', '.join(next(iter(per_node.values())))} on every node{without}")
    reason = f" ({notes[0]})" if notes else ""
    if seen.site.power_counters:
        reason += f", though the site file names {', '.join(seen.site.power_counters)}"
    return Finding("power counters", "note", f"none can be read{reason}",
                   "energy will be estimated by the site's power model, and say so",
                   "ask the site for pm_counters or readable RAPL")  # fmt: skip


def _wandb(seen: Seen) -> Finding:
    row = seen.ranks[0]
    if row.get("wandb"):
        return Finding("W&B", "ok", "api.wandb.ai can be reached from compute nodes")
    reason = f"{row['wandb_reason']}{', though the site file says so' if seen.site.outgoing_network else ''}"
    return Finding("W&B", "note", f"no way from compute nodes to api.wandb.ai ({reason})",
                   "runs are written offline",
                   "on a login node: python launch.py sync RUN")  # fmt: skip


def _seconds(text: str) -> float:
    """'30 sec', '00:01:30', '15', '1-00:00:00' or 'UNLIMITED' in seconds; what cannot be read is 0."""
    plain = re.match(r"^\s*(\d+)(?:\s*sec)?\s*$", text)
    if plain:
        return float(plain[1])
    clock = re.match(r"^(?:(\d+)-)?(\d+):(\d+):(\d+)$", text.strip())
    if clock:
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    return 0.0
