"""Submit a chain to Slurm in one go, so that nothing has to stay alive on the login node.

    {"event": "intent", "token", "time", "stages"}                               before sbatch
    {"event": "submit", "token", "time", "stages", "jobs", "dependency", "nodes", "time_limit_min", "partition"}
    {"event": "cancel", "time", "stages"}

RUN/submissions.jsonl is what makes a second `submit` harmless: a stage whose job is alive is left alone, a done one is
left out. The job of a launcher that died between sbatch and its record is found by the token in its comment.
"""

import contextlib
import io
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from hpc.config import RunConfig, Stage
from hpc.errors import ConfigError, SiteError
from hpc.plan.plan import Plan
from hpc.plan.show import energy
from hpc.run.attempts import exclusive, failing_nodes
from hpc.run.directory import RunDirectory, append_jsonl, read_jsonl, storage_errors, write_atomic, write_json
from hpc.run.receipt import read_receipt
from hpc.run.task import asked, asked_to_learn
from slurm import commands
from slurm.chain import stage_plan, task_file
from slurm.commands import QueuedJob
from slurm.fetch import fetch_sources
from slurm.jobs import JobSpec, check_path, group, make_spec
from slurm.site import Scheduler, Site
from slurm.snapshot import snapshot
from slurm.state import input_digests
from slurm.submit import script_text, submit_slurm
from slurm.worker import StageTask

NOT_NOW = "Requested node configuration is not available"
"""What `sbatch --test-only` says of nodes that are too small, and of nodes that are drained."""


@dataclass(frozen=True)
class Submitted:
    """What a submission did."""

    run: RunDirectory
    done: tuple[str, ...]
    """Stages with a valid receipt."""
    alive: dict[str, str]
    """Stages that were submitted before -> their job."""
    new: dict[str, str]
    """Stages that were submitted now -> their job."""


def submit_chain(
    config: RunConfig, site: Site, plan: Plan, only: Sequence[str] = (), confirm: Callable[[str], bool] | None = None
) -> Submitted:
    """Submit every stage that is neither done nor on its way; with `only`, those and what depends on them.

    `confirm` is asked with one line when the cost is above the site's thresholds; None means yes.
    Raises ConfigError, SiteError (nothing was submitted, or the message names what was) or BusyError.
    """
    scheduler = scheduler_of(site)
    run = RunDirectory.create(Path(config.run_root), config.name)
    check_path(run.root, "run_root")
    with exclusive(run.lock, f"the run directory {run.root}"):
        cancel_orphans(run)
        done = done_stages(run, config)
        queue = {job.job: job for job in commands.queue()}
        alive = alive_jobs(run, queue)
        wanted = [
            stage
            for stage in config.ordered()
            if stage.name not in done and stage.name not in alive and (not only or _concerns(config, stage, only))
        ]
        _check_changes(run, config, alive)
        specs = preview(config, site, plan, run, wanted)
        for spec in distinct_requests(specs):
            check_request(spec, site, run)
        question = cost_question(specs, plan, site)
        if question and confirm is not None and not confirm(question):
            raise ConfigError("not submitted: the cost was not confirmed")
        _write_run(run, config, site, plan)
        fetch_sources(run, config)
        code = snapshot(run)
        new: dict[str, str] = {}
        for members in group(config, wanted):
            spec = make_spec(members, plan, scheduler, {**alive, **new}, _shunned(run))
            _cancel_hopeless(run, members, queue)
            new.update(_submit_one(run, config, site, plan, spec, members, code))
    return Submitted(run, tuple(done), alive, new)


def scheduler_of(site: Site) -> Scheduler:
    """The site's scheduler, with an account where one is required. Raises ConfigError."""
    if site.slurm is None:
        raise ConfigError(f"site {site.name!r} has no Slurm: use `launch.py run`, or --site NAME of a cluster")
    if site.slurm.account_required and site.slurm.account is None:
        raise ConfigError(
            f"site {site.name!r} refuses jobs without an account, and slurm.account is null: add "
            "--site-set slurm.account=YOURS"
        )
    return site.slurm


def preview(
    config: RunConfig, site: Site, plan: Plan, run: RunDirectory, wanted: Sequence[Stage] | None = None
) -> list[JobSpec]:
    """The jobs of a chain as they would be submitted; names in angle brackets stand for ids."""
    specs = []
    jobs: dict[str, str] = {}
    for members in group(config, list(config.ordered()) if wanted is None else wanted):
        spec = make_spec(members, plan, scheduler_of(site), jobs, _shunned(run))
        specs.append(spec)
        for index, member in enumerate(members):
            jobs[member.name] = f"<{spec.name}>_{index}" if len(members) > 1 else f"<{spec.name}>"
    return specs


def dry_run(config: RunConfig, site: Site, plan: Plan) -> str:
    """The sbatch text of every job."""
    run = RunDirectory((Path(config.run_root) / config.name).absolute())
    check_path(run.root, "run_root")
    code = run.root / "code" / "SNAPSHOT"
    return "\n\n".join(
        f"##### {spec.name}: {', '.join(spec.stages)}\n{script_text(spec, site, run, code)}"
        for spec in preview(config, site, plan, run)
    )


def distinct_requests(specs: Sequence[JobSpec]) -> list[JobSpec]:
    """One job for each different request, without what only differs in names and waits."""
    return list({replace(spec, name="", stages=(), dependency=None): spec for spec in specs}.values())


def cost_question(specs: Sequence[JobSpec], plan: Plan, site: Site) -> str | None:
    """What to ask before these jobs are submitted; None when they are cheap."""
    hours = sum(spec.node_hours for spec in specs)
    names = {stage for spec in specs for stage in spec.stages}
    joules = sum(stage.energy.value or 0.0 for stage in plan.stages if stage.name in names)
    limits = site.confirm
    if (limits.node_hours is None or hours <= limits.node_hours) and (
        limits.kwh is None or joules <= limits.kwh * 3.6e6
    ):
        return None
    thresholds = [
        f"{value:g} {unit}" for value, unit in ((limits.node_hours, "node-hours"), (limits.kwh, "kWh")) if value
    ]
    return (
        f"This may cost {hours:,.1f} node-hours (sum of the time limits) and about {energy(joules)} of IT energy "
        f"(estimated by the plan). Site {site.name!r} asks above "
        f"{' or '.join(thresholds)}."
    )


def done_stages(run: RunDirectory, config: RunConfig) -> list[str]:
    """Stages whose receipt is valid for what is asked, and whose inputs are done too. Files are not hashed here."""
    done: list[str] = []
    for stage in config.ordered():
        receipt = read_receipt(run.stage(stage.name))
        if receipt is None or not all(need in done for need in stage.needs):
            continue
        if receipt.config == asked(stage, config.seed) and receipt.inputs == input_digests(run, stage):
            done.append(stage.name)
    return done


def stage_jobs(run: RunDirectory) -> dict[str, str]:
    """Stage -> id of the job that was last submitted for it; a cancelled one is left out."""
    jobs: dict[str, str] = {}
    for row in read_jsonl(run.submissions):
        if row["event"] == "submit":
            jobs.update(zip(row["stages"], row["jobs"], strict=True))
        elif row["event"] == "cancel":
            for stage in row["stages"]:
                jobs.pop(stage, None)
    return jobs


def alive_jobs(run: RunDirectory, queue: dict[str, QueuedJob]) -> dict[str, str]:
    """Stage -> job, of those that Slurm may still run."""
    return {stage: job for stage, job in stage_jobs(run).items() if job in queue and queue[job].is_alive}


def cancel_orphans(run: RunDirectory) -> None:
    """Cancel jobs whose launcher died between sbatch and its record; found by the token in their comment.

    Their pickled task may never have been put in place; they are submitted afresh.
    """
    rows = read_jsonl(run.submissions)
    recorded = {row["token"] for row in rows if row["event"] == "submit"}
    open_intents = [row for row in rows if row["event"] == "intent" and row["token"] not in recorded]
    if not open_intents:
        return
    by_token: dict[str, list[str]] = {}
    for job in commands.queue():
        by_token.setdefault(job.comment, []).append(job.job)
    for row in open_intents:
        ids = sorted(by_token.get(f"greenmoe:{row['token']}", []), key=_task_number)
        if len(ids) == len(row["stages"]):
            commands.call("scancel", *dict.fromkeys(job.split("_")[0] for job in ids), check=False)


def _task_number(job: str) -> int:
    return int(job.partition("_")[2] or 0)


def _concerns(config: RunConfig, stage: Stage, names: Sequence[str]) -> bool:
    """Whether a stage is one of these, or depends on one."""
    return stage.name in names or any(_concerns(config, config.stage(need), names) for need in stage.needs)


def _check_changes(run: RunDirectory, config: RunConfig, alive: dict[str, str]) -> None:
    """Refuse to change what a waiting or running job is about to do."""
    for name, job in alive.items():
        if name not in {stage.name for stage in config.stages}:
            raise ConfigError(
                f"stage {name!r} is on its way as job {job}, but not in this file: `launch.py cancel` first"
            )
        try:
            saved = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return
        before = next((RunConfig.model_validate(saved).stage(name) for s in saved["stages"] if s["name"] == name), None)
        if before is not None and asked(before, saved["seed"]) != asked(config.stage(name), config.seed):
            raise ConfigError(
                f"stage {name!r} is on its way as job {job} with other settings: `launch.py cancel` it first"
            )


def check_request(spec: JobSpec, site: Site, run: RunDirectory) -> None:
    """Let Slurm say whether it would take this request. Raises SiteError with its words and a way out."""
    text = script_text(replace(spec, stages=spec.stages[:1], dependency=None), site, run, run.root)
    lines = [line for line in text.splitlines() if line.startswith("#") and not line.startswith("#SBATCH --chdir")]
    path = run.root / ".request.sh"
    write_atomic(path, "\n".join([*lines, "true", ""]))
    try:
        result = commands.call("sbatch", "--test-only", str(path), check=False)
    finally:
        path.unlink(missing_ok=True)
    if result.returncode:
        if NOT_NOW in result.stderr and commands.has_absent_nodes(spec.partition):
            return  # a real sbatch decides, and keeps the job for when they are back
        asked_for = (
            f"partition {spec.partition}, {spec.nodes} nodes x {spec.tasks_per_node} ranks, {spec.time_limit_min} min"
        )
        raise SiteError(
            f"Slurm would refuse stage {spec.stages[0]!r} ({asked_for}): {commands.told(result.stderr)}; "
            f"correct the site (--site-set slurm.partition=...) or the stage's resources; `sinfo` shows what there is"
        )


def _write_run(run: RunDirectory, config: RunConfig, site: Site, plan: Plan) -> None:
    write_atomic(run.config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_atomic(run.site, yaml.safe_dump(site.model_dump(mode="json"), sort_keys=False))
    write_json(run.plan, plan.to_json())


def _shunned(run: RunDirectory) -> list[str]:
    stages = run.root / "stages"
    return failing_nodes([run.stage(path.name) for path in stages.iterdir()]) if stages.exists() else []


def _cancel_hopeless(run: RunDirectory, members: Sequence[Stage], queue: dict[str, QueuedJob]) -> None:
    """Remove jobs of these stages whose dependency can never be met, where Slurm has not done so yet."""
    jobs = stage_jobs(run)
    for stage in members:
        job = queue.get(jobs.get(stage.name, ""))
        if job is not None and job.state == "PENDING" and not job.is_alive:
            commands.call("scancel", job.job, check=False)


def _submit_one(
    run: RunDirectory, config: RunConfig, site: Site, plan: Plan, spec: JobSpec, members: Sequence[Stage], code: Path
) -> dict[str, str]:
    token = uuid.uuid4().hex
    names = [stage.name for stage in members]
    for stage in members:
        directory = run.stage(stage.name)
        with storage_errors(directory.root):
            directory.root.mkdir(parents=True, exist_ok=True)
        task = task_file(run, config, site, stage, stage_plan(plan, stage))
        if directory.task.exists():
            task = _continue_or_set_aside(run, stage, task)
        task.write(directory.task)
        append_jsonl(directory.attempts, {"event": "submit", "time": time.time()})
    append_jsonl(run.submissions, {"event": "intent", "token": token, "time": time.time(), "stages": names})
    tasks = [StageTask(str(run.stage(name).root), token) for name in names]
    with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what the error says again
        ids = submit_slurm(replace(spec, comment=f"greenmoe:{token}"), site, run, code, tasks)
    row: dict[str, Any] = {
        "event": "submit", "token": token, "time": time.time(), "stages": names, "jobs": ids,
        "dependency": spec.dependency, "nodes": spec.nodes, "time_limit_min": spec.time_limit_min,
        "partition": spec.partition, "code": code.name,
    }  # fmt: skip
    append_jsonl(run.submissions, row)
    return dict(zip(names, ids, strict=True))


def _continue_or_set_aside(run: RunDirectory, stage: Stage, task: Any) -> Any:
    """Keep what an earlier attempt left if it was asked for the same; the worker compares the inputs when it starts."""
    directory = run.stage(stage.name)
    before = type(task).read(directory.task)
    if asked_to_learn(before.stage, before.seed) != asked_to_learn(task.stage, task.seed):
        run.supersede(stage.name)
        directory.root.mkdir(parents=True, exist_ok=True)
        return task
    return task.model_copy(update={"inputs": before.inputs})
