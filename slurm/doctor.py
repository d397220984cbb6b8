"""`launch.py doctor`: one small job before the first real one, and what a person should know about the site."""

import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hpc.errors import SiteError, Stopped
from hpc.plan.plan import Plan
from hpc.run.directory import RunDirectory
from slurm import commands
from slurm.batch import check_request, scheduler_of
from slurm.findings import Finding, Level, Seen, examine
from slurm.jobs import JobSpec, check_path
from slurm.probe import ProbeTask, read_ranks
from slurm.site import Site
from slurm.snapshot import snapshot
from slurm.status import REASONS
from slurm.submit import submit_slurm

POLL_S = 1.0
TIME_LIMIT_MIN = 10
STALE_S = 600
STATE_BYTES_PER_PARAMETER = 16
"""fp32 weights, two Adam moments and a fp32 or 16-bit copy, as DeepSpeed's ZeRO writes them at most."""
STYLE: dict[Level, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}


def look(
    site: Site,
    run_root: Path,
    nodes: int,
    ranks_per_node: int,
    plan: Plan | None,
    wait_min: float,
    say: Callable[[str], None],
) -> list[Finding]:
    """Submit one small job, wait for it and examine what was seen. Raises SiteError, ConfigError or Stopped."""
    scheduler = scheduler_of(site)
    run = RunDirectory.create(run_root, f"doctor-{site.name}")
    check_path(run.root, "--run-root")
    settings = commands.settings()
    partition = commands.partition(scheduler.partition)
    folder = run.root / uuid.uuid4().hex[:8]
    folder.mkdir()
    spec = JobSpec(
        name="doctor", stages=("doctor",), nodes=nodes, tasks_per_node=ranks_per_node,
        time_limit_min=min(TIME_LIMIT_MIN, scheduler.max_time_min or TIME_LIMIT_MIN), dependency=None,
        partition=scheduler.partition, qos=scheduler.qos, cpus_per_task=scheduler.cpus_per_task,
        memory_per_node=scheduler.memory_per_node, comment=f"greenmoe:{folder.name}", is_stage=False,
    )  # fmt: skip
    check_request(spec, site, run)
    task = ProbeTask(str(folder), site.network_interface, nodes)
    began = time.time()
    job = submit_slurm(spec, site, run, snapshot(run), [task])[0]
    say(f"job {job}: {nodes} nodes x {ranks_per_node} ranks, at most {spec.time_limit_min} min")
    started = _wait(job, folder, wait_min, say)
    ranks = read_ranks(folder)
    status = os.statvfs(run.root)
    log = run.jobs / f"{job}_0_log.err"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line] if log.exists() else []
    seen = Seen(
        site=site, settings=settings, partition=partition, has_accounting=commands.accounting([job]) is not None,
        free_bytes=status.f_bavail * status.f_frsize, free_inodes=status.f_favail, stale_locks=stale_locks(),
        checkpoint_bytes=_checkpoint_bytes(plan), ranks=ranks, expected_ranks=nodes * ranks_per_node, job=job,
        queued_s=None if started is None else started - began, log=lines,
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    return examine(seen)


def _wait(job: str, folder: Path, wait_min: float, say: Callable[[str], None]) -> float | None:
    """Until the job has ended; returns when its first rank was heard. A job that does not start is cancelled."""
    deadline, started, told = time.monotonic() + 60 * wait_min, None, ""
    try:
        while True:
            queued = next((row for row in commands.queue() if row.job == job), None)
            if started is None and any(folder.glob("rank-*.json")):
                started = time.time()
            if queued is None or not queued.is_alive:
                return started
            text = REASONS.get(queued.reason, queued.reason) if queued.state == "PENDING" else "runs"
            if text != told:
                say(f"job {job}: {text}")
                told = text
            if queued.state == "PENDING" and time.monotonic() > deadline:
                raise SiteError(
                    f"job {job} did not start in {wait_min:g} min ({text}) and was cancelled: try later, or --wait MIN"
                )
            time.sleep(POLL_S)
    except (KeyboardInterrupt, SiteError) as error:
        commands.call("scancel", job, check=False)
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(f"stopped; job {job} was cancelled") from None
        raise


def stale_locks() -> list[str]:
    """Locks of extension builds in the user's own folder that nobody has touched for ten minutes."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions"))
    try:
        return sorted(str(path) for path in root.glob("**/lock") if time.time() - path.stat().st_mtime > STALE_S)
    except OSError:
        return []


def _checkpoint_bytes(plan: Plan | None) -> float | None:
    sizes = [STATE_BYTES_PER_PARAMETER * (stage.trainable_params or 0) for stage in plan.stages] if plan else []
    return float(max(sizes)) if any(sizes) else None


def show(findings: list[Finding], console: Console | None = None) -> None:
    """Print findings; what is not well comes with its reason and a way out."""
    console = console or Console(highlight=False, soft_wrap=True)
    width = max(len(finding.topic) for finding in findings) + 2
    for finding in findings:
        line = Text(f"{finding.level:<8}", STYLE[finding.level]) + Text(f"{finding.topic:<{width}}", "bold")
        console.print(line + Text(finding.what, ""))
        for label, text in (("why", finding.why), ("do", finding.do)):
            if finding.level != "ok" and text:
                console.print(Text(" " * (8 + width) + f"{label}: {text}", "dim" if label == "why" else ""))
