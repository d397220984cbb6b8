"""The door to Slurm's commands: short calls, their tables read into rows, and their refusals told in one line."""

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from hpc.energy.counters.slurm import consumed_energy_j
from hpc.errors import SiteError

TIMEOUT_S = 30
ALIVE = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
         "SIGNALING", "STAGE_OUT", "STOPPED"}  # fmt: skip
"""States of a job that may still do something."""

NO_CLUSTER = "Could not establish a configuration source"
"""What every Slurm command says where there is neither a slurm.conf nor a controller that hands one out."""
WAY_OUT = (
    "run this on a login node; for --site devcluster first python launch.py devcluster up, then "
    'eval "$(python launch.py devcluster env)"'
)


@dataclass(frozen=True)
class QueuedJob:
    """A job as `squeue` or `sacct` shows it."""

    job: str
    """Id; 44_1 for a task of an array."""
    state: str
    reason: str = ""
    start: str = ""
    """Expected or actual start."""
    end: str = ""
    nodes: str = ""
    comment: str = ""
    exit_code: str = ""

    @property
    def is_alive(self) -> bool:
        """Whether it may still run. A job whose dependency can never be met will not."""
        return self.state in ALIVE and self.reason != "DependencyNeverSatisfied"


def call(*words: str, check: bool = True, timeout_s: float = TIMEOUT_S) -> "subprocess.CompletedProcess[str]":
    """Run a Slurm command. Raises SiteError when it is missing, hangs or (with `check`) refuses."""
    conf = os.environ.get("SLURM_CONF")
    if conf and not os.path.exists(conf):  # Slurm's own commands would look for it for a minute
        raise SiteError(f"SLURM_CONF = {conf} does not exist: {WAY_OUT}")
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s)
    except FileNotFoundError:
        raise SiteError(f"{words[0]} is not here: run this on a login node of the cluster, or take --dry-run") from None
    except subprocess.TimeoutExpired:
        raise SiteError(
            f"{words[0]} did not answer in {timeout_s:.0f} s: the Slurm controller is busy; try later"
        ) from None
    if NO_CLUSTER in result.stderr:
        raise SiteError(f"{words[0]} finds no cluster from here: {WAY_OUT}")
    if check and result.returncode:
        raise SiteError(f"{words[0]} refused: {told(result.stderr or result.stdout)}")
    return result


def told(text: str) -> str:
    """What a Slurm command complained about, without its prefixes."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or "no reason given"


def queue() -> list[QueuedJob]:
    """All jobs of this user that the controller remembers, arrays written out. Raises SiteError."""
    text = call(
        "squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}",
        "--format=%i|%T|%r|%S|%e|%N|%k",
    ).stdout  # fmt: skip
    jobs = []
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) >= 7:
            job, state, reason, start, end, nodes, *comment = fields
            jobs.append(QueuedJob(job, state, reason, start, end, nodes, "|".join(comment)))
    return jobs


def accounting(ids: Sequence[str]) -> list[QueuedJob] | None:
    """Jobs as the accounting database remembers them; None where there is none."""
    if shutil.which("sacct") is None:
        return None
    if not ids:
        return []
    result = call(
        "sacct", "--noheader", "--allocations", "--parsable2", "--jobs", ",".join(ids),
        "--format=JobID,State,Reason,Start,End,NodeList,Comment,ExitCode", check=False,
    )  # fmt: skip
    if result.returncode:
        return None
    rows = [line.split("|") for line in result.stdout.splitlines() if line.count("|") == 7]
    jobs = []
    for job, state, reason, start, end, nodes, comment, exit_code in rows:
        jobs.append(QueuedJob(job, state.split()[0], reason, start, end, nodes, comment, exit_code))
    return jobs


def consumed_energy(ids: Sequence[str]) -> dict[str, list[float | None]]:
    """Raw job id -> joules of each of its attempts, in their order, as the accounting database has them.

    Allocations only: the rows of steps hold the same energy again. None for an attempt without a figure: Slurm writes
    one only where the job ended by itself, not where it was requeued or lost a node (seen with 22.05).
    Raises SiteError when sacct is missing or hangs.
    """
    result = call(
        "sacct", "--noheader", "--allocations", "--duplicates", "--parsable2", "--jobs", ",".join(ids),
        "--format=JobIDRaw,ConsumedEnergyRaw", check=False,
    )  # fmt: skip
    found: dict[str, list[float | None]] = {}
    for line in result.stdout.splitlines() if result.returncode == 0 else []:
        job, _, raw = line.partition("|")
        found.setdefault(job, []).append(consumed_energy_j(raw))
    return found


def settings() -> dict[str, str]:
    """The controller's configuration. Raises SiteError."""
    pairs = (line.partition("=") for line in call("scontrol", "show", "config").stdout.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def partition(name: str | None) -> dict[str, str]:
    """One partition, the default one for None; empty when there is none of that name. Raises SiteError."""
    for line in call("scontrol", "--oneliner", "show", "partition").stdout.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if fields.get("PartitionName") == name or (name is None and fields.get("Default") == "YES"):
            return fields
    return {}


def this_job() -> str:
    """The job that this process is in, as Slurm's commands take it: ARRAY_TASK in an array.

    The plain number of an array's last task is that of the whole array as well: a requeue by it ends all tasks (22.05).
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]


def job_state(job: str) -> str:
    """State of one job, '' when Slurm does not know it (any more) or does not answer."""
    try:
        text = call("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T", check=False).stdout
    except SiteError:
        return ""
    return text.split()[0] if text.split() else ""


def end_time(job: str) -> float | None:
    """When Slurm will end a job, seconds since the epoch; None when it has no limit or Slurm does not say."""
    try:
        text = call("squeue", "--noheader", f"--jobs={job}", "--format=%e", check=False).stdout.strip()
        return datetime.fromisoformat(text.splitlines()[0]).timestamp()
    except (SiteError, ValueError, IndexError):
        return None


def requeue(job: str, exclude: Sequence[str] = ()) -> str | None:
    """Put a job back into the queue, away from some nodes; returns why that failed, None when it did not."""
    try:
        result = call("scontrol", "requeue", job, check=False)
        if result.returncode:
            return told(result.stderr)
        if exclude:
            call("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(exclude)}", check=False)
    except SiteError as error:
        return str(error)
    return None


def bad_nodes(nodes: Sequence[str]) -> list[str]:
    """Those of some nodes that are down, failing or do not answer."""
    try:
        text = call("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T", check=False).stdout
    except SiteError:
        return []
    states = dict(line.split() for line in text.splitlines() if len(line.split()) == 2)
    return [name for name in nodes if re.search(r"down|fail|unk|drain|\*", states.get(name, ""))]


def has_absent_nodes(partition: str | None) -> bool:
    """Whether a partition (all of them for None) has nodes that take no jobs at the moment."""
    where = [f"--partition={partition}"] if partition else []
    text = call("sinfo", "--noheader", "--Node", *where, "--format=%T", check=False).stdout
    return bool(re.search(r"down|fail|unk|drain|maint|\*", text))


def hostnames(nodelist: str) -> list[str]:
    """A node list such as n[1-3,7] written out, by Slurm itself."""
    return call("scontrol", "show", "hostnames", nodelist).stdout.split() if nodelist else []
