"""What a person does with a chain on Slurm: read its logs, cancel it, try a stage again, go on."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

from hpc.config import RunConfig
from hpc.config.load import load_yaml_model
from hpc.config.near import nearest
from hpc.errors import ConfigError
from hpc.plan.plan import plan as make_plan
from hpc.run.directory import RunDirectory, append_jsonl, read_jsonl
from slurm import commands
from slurm.batch import Submitted, stage_jobs, submit_chain
from slurm.site import Site
from slurm.status import load_run

FOLLOW_EVERY_S = 0.5
TAIL_LINES = 40


def open_run(path: Path) -> RunDirectory:
    """The run that a person names: its directory, or a configuration file. Raises ConfigError."""
    if path.suffix in {".yaml", ".yml"}:
        from hpc.config.load import load_config

        config = load_config(path)
        path = Path(config.run_root) / config.name
    run = RunDirectory(path.absolute())
    if not run.config.exists():
        raise ConfigError(f"{path} is not a run directory: name the folder that `submit` printed")
    return run


def check_stage(config: RunConfig, name: str) -> None:
    """Raise ConfigError for a stage that the chain does not have."""
    names = [stage.name for stage in config.stages]
    if name not in names:
        raise ConfigError(f"there is no stage {name!r} in this chain{nearest(name, names)}")


def resubmit(
    run: RunDirectory, only: Sequence[str], confirm: Callable[[str], bool] | None, overrides: Sequence[str] = ()
) -> Submitted:
    """Submit what is neither done nor on its way, with the configuration and site of the run directory.

    With `only`, those stages and what depends on them; `overrides` change keys, as `--set` does.
    Raises ConfigError or SiteError.
    """
    load_run(run)
    config = load_yaml_model(run.config, RunConfig, overrides)
    for name in only:
        check_stage(config, name)
    try:
        site = Site.model_validate(yaml.safe_load(run.site.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValueError):
        raise ConfigError(f"{run.root} was never submitted: use `launch.py submit`") from None
    config = config.model_copy(update={"run_root": str(run.root.parent)})
    return submit_chain(config, site, make_plan(config, site.machine, site.facility), only, confirm)


def cancel(run: RunDirectory, only: Sequence[str] = ()) -> dict[str, str]:
    """Cancel jobs that wait or run; returns stage -> job. The record comes first, so that no job requeues itself."""
    config = load_run(run)
    for name in only:
        check_stage(config, name)
    queue = {job.job: job for job in commands.queue()}
    jobs = {
        stage: job
        for stage, job in stage_jobs(run).items()
        if (not only or stage in only) and job in queue and queue[job].state in commands.ALIVE
    }
    if jobs:
        append_jsonl(run.submissions, {"event": "cancel", "time": time.time(), "stages": list(jobs)})
        commands.call("scancel", *jobs.values())
    return jobs


def log_files(run: RunDirectory, stage: str) -> dict[int, list[Path]]:
    """Rank -> its files of standard output and error, over all jobs of a stage, oldest first."""
    check_stage(load_run(run), stage)
    found: dict[int, list[Path]] = {}
    ids = [
        job
        for row in read_jsonl(run.submissions)
        if row["event"] == "submit" and stage in row["stages"]
        for name, job in zip(row["stages"], row["jobs"], strict=True)
        if name == stage
    ]
    for job in ids:
        for path in sorted(run.jobs.glob(f"{job}_*_log.*")):
            name = re.fullmatch(rf"{re.escape(job)}_(\d+)_log\.(out|err)", path.name)
            if name:
                found.setdefault(int(name[1]), []).append(path)
    return dict(sorted(found.items()))


def logs(run: RunDirectory, stage: str, rank: int | None) -> Iterator[str]:
    """Lines to show: first the traceback of the rank that failed first, then the end of the log asked for."""
    files = log_files(run, stage)
    if not files:
        yield f"{stage}: no log yet; `launch.py status {run.root}` tells why"
        return
    directory = run.stage(stage)
    rows = read_jsonl(directory.attempts)
    failed = [row for row in rows if row.get("event") == "end" and row["outcome"] == "failed"]
    if failed and rank is None:
        newest = max(row["attempt"] for row in failed)
        first = min((row for row in failed if row["attempt"] == newest), key=lambda row: float(row["time"]))
        yield f"== {stage}: attempt {newest} failed first on rank {first['rank']} ({first['node']}): {first['message']}"
        yield from _traceback([path for path in files.get(first["rank"], []) if path.suffix == ".err"])
    if rank is not None and rank not in files:
        raise ConfigError(f"--rank {rank}: stage {stage!r} has logs of ranks {min(files)} to {max(files)}")
    for path in files[rank if rank is not None else min(files)]:
        lines = path.read_text(errors="replace").splitlines()
        if lines:
            yield f"== {path}" + (f" (last {TAIL_LINES} of {len(lines)} lines)" if len(lines) > TAIL_LINES else "")
            yield from lines[-TAIL_LINES:]


def follow(run: RunDirectory, stage: str, rank: int | None) -> Iterator[str]:
    """New lines of a rank's logs, until the stage has a receipt or Slurm no longer runs it."""
    sizes: dict[Path, int] = {path: path.stat().st_size for paths in log_files(run, stage).values() for path in paths}
    while True:
        files = log_files(run, stage)
        for path in files.get(rank if rank is not None else min(files, default=0), []):
            with path.open("rb") as file:
                file.seek(sizes.get(path, 0))
                text = file.read()
            sizes[path] = sizes.get(path, 0) + len(text)
            yield from text.decode(errors="replace").splitlines()
        job = stage_jobs(run).get(stage)
        if run.stage(stage).receipt.exists() or (job is not None and commands.job_state(job) not in commands.ALIVE):
            return
        time.sleep(FOLLOW_EVERY_S)


def _traceback(paths: Sequence[Path]) -> Iterator[str]:
    """The last traceback in a log."""
    for path in reversed(paths):
        lines = path.read_text(errors="replace").splitlines()
        starts = [index for index, line in enumerate(lines) if line.startswith("Traceback")]
        if starts:
            end = next(
                (
                    i
                    for i in range(starts[-1] + 1, len(lines))
                    if lines[i] and not lines[i].startswith((" ", "Traceback"))
                ),
                len(lines) - 1,
            )
            yield from lines[starts[-1] : end + 1]
            return
