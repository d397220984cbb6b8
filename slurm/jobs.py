"""A chain as Slurm jobs, before anything is submitted: what shares a job, what it asks for, what it waits for."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.config import RunConfig, Stage
from hpc.errors import ConfigError
from hpc.plan.plan import Plan
from hpc.run.directory import RunDirectory
from slurm.site import Scheduler, Site

SAFE_PATH = re.compile(r"^[A-Za-z0-9._/+@=:-]+$")
"""Paths that mean the same to a shell, to sbatch (no %) and to a person."""


@dataclass(frozen=True)
class JobSpec:
    """One Slurm job, or one array of jobs with the same resources."""

    name: str
    stages: tuple[str, ...]
    """One for each task of the array; a single one for a plain job."""
    nodes: int
    tasks_per_node: int
    time_limit_min: int
    dependency: str | None
    """As sbatch takes it, without kill-on-invalid-dep, which every job has."""
    partition: str | None
    qos: str | None
    cpus_per_task: int | None
    memory_per_node: str | None
    exclude: tuple[str, ...] = ()
    comment: str = ""
    is_stage: bool = True
    """Whether `slurm.restart` decides what happens after it."""

    @property
    def node_hours(self) -> float:
        """Node-hours of the time limits: the most that it can cost before it is requeued."""
        return len(self.stages) * self.nodes * self.time_limit_min / 60


def group(config: RunConfig, wanted: Sequence[Stage]) -> list[tuple[Stage, ...]]:
    """Stages that go to Slurm together, in an order in which each comes after what it needs."""
    groups: list[tuple[Stage, ...]] = []
    taken: set[str] = set()
    for stage in wanted:
        if stage.name in taken:
            continue
        members = [stage]
        if stage.array:
            names = {other.name for other in config.stages if other.array == stage.array}
            for other in wanted:
                is_later = other.name not in taken and other.name != stage.name
                if is_later and other.array == stage.array and not _reaches(config, other, names):
                    members.append(other)
        taken.update(member.name for member in members)
        groups.append(tuple(members))
    return _sorted(config, groups)


def _reaches(config: RunConfig, stage: Stage, names: set[str]) -> bool:
    """Whether a stage depends on one of the named ones: it cannot share an array with them."""
    return any(need in names or _reaches(config, config.stage(need), names) for need in stage.needs)


def _sorted(config: RunConfig, groups: list[tuple[Stage, ...]]) -> list[tuple[Stage, ...]]:
    """Groups after those that their members need."""
    place = {stage.name: index for index, members in enumerate(groups) for stage in members}
    done: list[int] = []

    def visit(index: int) -> None:
        if index in done:
            return
        for stage in groups[index]:
            for need in stage.needs:
                if place.get(need, index) != index:
                    visit(place[need])
        done.append(index)

    for index in range(len(groups)):
        visit(index)
    return [groups[index] for index in done]


def make_spec(
    members: Sequence[Stage],
    plan: Plan,
    scheduler: Scheduler,
    jobs: Mapping[str, str],
    exclude: Sequence[str] = (),
    comment: str = "",
) -> JobSpec:
    """What one group asks for. `jobs`: stage -> id of the job that makes it, for needs that are not done yet.

    Raises ConfigError for a request that the site cannot meet.
    """
    planned = {stage.name: stage for stage in plan.stages}
    first = members[0]
    shapes = {(planned[m.name].nodes, planned[m.name].ranks_per_node, m.resources) for m in members}
    if len(shapes) > 1:
        raise ConfigError(f"array {first.array!r}: its stages ask for different resources; give them the same ones")
    asked, shape = first.resources, planned[first.name]
    time_limit = asked.time_limit_min or scheduler.time_limit_min
    if scheduler.max_time_min is not None and time_limit > scheduler.max_time_min:
        raise ConfigError(
            f"stage {first.name!r}: resources.time_limit_min = {time_limit}, but the site allows "
            f"{scheduler.max_time_min}: ask for less; training goes on in a new job from its checkpoint"
        )
    return JobSpec(
        name=first.array if len(members) > 1 and first.array else first.name,
        stages=tuple(member.name for member in members),
        nodes=shape.nodes,
        tasks_per_node=shape.ranks_per_node,
        time_limit_min=time_limit,
        dependency=dependency([member.needs for member in members], jobs),
        partition=asked.partition or scheduler.partition,
        qos=asked.qos or scheduler.qos,
        cpus_per_task=asked.cpus_per_task or scheduler.cpus_per_task,
        memory_per_node=asked.memory_per_node or scheduler.memory_per_node,
        exclude=tuple(exclude),
        comment=comment,
    )


def dependency(needs: Sequence[Sequence[str]], jobs: Mapping[str, str]) -> str | None:
    """What an array (one list of needs per task) waits for: `aftercorr` where task k needs task k, else `afterok`."""
    waiting = [[jobs[need] for need in task if need in jobs] for task in needs]
    paired = [
        array
        for array in dict.fromkeys(job.split("_")[0] for job in (waiting[0] if waiting else []) if "_" in job)
        if len(needs) > 1 and all(_of(array, task) == [f"{array}_{k}"] for k, task in enumerate(waiting))
    ]
    rest = dict.fromkeys(job for task in waiting for job in task if job.split("_")[0] not in paired)
    parts = [f"aftercorr:{array}" for array in paired]
    if rest:
        parts.insert(0, "afterok:" + ":".join(rest))
    return ",".join(parts) or None


def _of(array: str, jobs: Sequence[str]) -> list[str]:
    return [job for job in jobs if job.split("_")[0] == array]


def setup_lines(site: Site, code: Path, environment: Mapping[str, str], cpus_per_task: int | None) -> list[str]:
    """The shell before the ranks: it ends the job at the first line that fails, and says which."""
    values = {**environment, "OMP_NUM_THREADS": str(cpus_per_task or 1), **site.environment}
    if site.network_interface:
        values.update(GLOO_SOCKET_IFNAME=site.network_interface, NCCL_SOCKET_IFNAME=site.network_interface)
    return [
        "set -e",
        """trap 'echo "setup failed: $BASH_COMMAND" >&2' ERR""",
        *(f"module load {shlex.quote(name)}" for name in site.modules),
        *site.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in values.items()),
        f"export PYTHONPATH={shlex.quote(str(code))}",
        'export TORCH_EXTENSIONS_DIR="${TMPDIR:-/tmp}/torch_extensions-$SLURM_JOB_ID"',
        f'export SRUN_CPUS_PER_TASK="${{SLURM_CPUS_PER_TASK:-{cpus_per_task or 1}}}"',
        "trap - ERR",
        "set +e",
    ]


def teardown_lines(site: Site, run: RunDirectory, stages: Sequence[str]) -> list[str]:
    """The shell after the ranks: decide what happens next, whatever ended them."""
    words = [shlex.quote(str(run.root)), *(shlex.quote(stage) for stage in stages)]
    return ["status=$?", f'exec {python(site)} -m slurm.restart {" ".join(words)} --status "$status"', ""]


def python(site: Site) -> str:
    """The command that starts Python on a compute node."""
    return site.python or shlex.quote(sys.executable)


def check_path(path: Path, what: str) -> None:
    """Raise ConfigError for a path that a job script cannot carry."""
    if not SAFE_PATH.match(str(path)):
        raise ConfigError(f"{what} = {str(path)!r}: only letters, digits and ._/+@=:- may reach a job script")
