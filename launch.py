#!/usr/bin/env python
"""GreenMoE: one YAML file from raw text to a quantized mixture-of-experts model, with its energy."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from hpc.errors import EXIT_CODES, GreenMoEError, StageError

CONFIG = click.argument("config", type=click.Path(path_type=Path))
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B.C=VALUE",
    help="Override a key, e.g. stages.pretrain.train.steps=50.",
)
SITE = click.option("--site", default="local", show_default=True, help="A site of configs/sites, or a YAML file.")
SITE_SET = click.option(
    "--site-set",
    "site_overrides",
    multiple=True,
    metavar="A.B=VALUE",
    help="Override a key of the site, e.g. slurm.account=ab12.",
)

RUN = click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
YES = click.option("--yes", is_flag=True, help="Do not ask, whatever it may cost.")


class Verbs(click.Group):
    """Errors that a user can cause end in one line and a documented exit code; commands keep the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which a newcomer meets them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except GreenMoEError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)


EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())


@click.group(
    cls=Verbs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
def main() -> None:
    """GreenMoE takes a mixture-of-experts language model from raw text to a quantized model that answers.

    One YAML file declares a chain of stages; every stage leaves a receipt with hashes, metrics and joules.

    \b
    First steps:
      python launch.py plan configs/quickstart.yaml      what would run, how long, how many watt-hours
      python launch.py run configs/quickstart.yaml       run it here; run it again and only what changed is done
      python launch.py explain train.router.top_k        what a key means
    """


@main.command()
@CONFIG
@SITE
@SET
def run(config: Path, site: str, overrides: tuple[str, ...]) -> None:
    """Run a chain on this machine.

    Stages whose receipts are valid are reused; Ctrl-C saves a checkpoint and stops; the same command goes on.
    """
    from slurm.chain import run_chain

    loaded, place, plan = _load(config, site, overrides)
    directory = run_chain(loaded, place, plan)
    if directory.report.exists():
        click.echo(f"report: {directory.report}")
    click.echo(f"run directory: {directory.root}")


@main.command()
@click.option("--site", required=True, help="A site of configs/sites, or a YAML file of your own.")
@SITE_SET
@click.option("--config", type=click.Path(path_type=Path), help="A chain: is there time and room for its checkpoints?")
@click.option("--run-root", type=click.Path(path_type=Path), default=Path("runs"), show_default=True,
              help="Where runs will be: a file system that all nodes share.")  # fmt: skip
@click.option("--nodes", default=2, show_default=True, type=click.IntRange(1))
@click.option("--ranks-per-node", type=click.IntRange(1), help="The site's ranks_per_node by default.")
@click.option("--wait", default=30.0, show_default=True, help="Minutes that the job may stay in the queue.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(
    site: str, site_overrides: tuple[str, ...], config: Path | None, run_root: Path, nodes: int,
    ranks_per_node: int | None, wait: float, as_json: bool,
) -> None:  # fmt: skip
    """Examine a site with one small job before the first real one: what was found, why it matters, what to do.

    Ranks, versions, network, shared files, clocks, space, signals, requeue, preemption, time to save, sacct, power
    counters, W&B. Ends with code 8 when something would keep a chain from running.
    """
    from dataclasses import asdict

    from hpc.config.load import load_config
    from hpc.errors import SiteError
    from hpc.plan.plan import plan as make_plan
    from slurm import doctor as doctors
    from slurm.site import load_site

    place = load_site(site, site_overrides)
    planned = make_plan(load_config(config), place.machine) if config else None
    found = doctors.look(
        place, run_root, min(nodes, place.machine.max_nodes), ranks_per_node or place.machine.ranks_per_node, planned,
        wait, lambda text: click.echo(text, err=True),
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        doctors.show(found)
    if any(finding.level == "problem" for finding in found):
        click.get_current_context().exit(SiteError.exit_code)


@main.command()
@CONFIG
@click.option("--site", required=True, help="A site of configs/sites, or a YAML file of your own.")
@SITE_SET
@SET
@click.option("--dry-run", is_flag=True, help="Print the sbatch text of every job and submit nothing.")
@YES
def submit(
    config: Path, site: str, site_overrides: tuple[str, ...], overrides: tuple[str, ...], dry_run: bool, yes: bool
) -> None:
    """Submit a chain to Slurm: one job per stage, arrays for matrices, dependencies between them.

    Nothing has to stay alive here. Submitting again is harmless: stages that are done or on their way are left alone.
    """
    from slurm import batch

    loaded, place, planned = _load(config, site, overrides, site_overrides)
    if dry_run:
        click.echo(batch.dry_run(loaded, place, planned))
        return
    _submitted(batch.submit_chain(loaded, place, planned, confirm=None if yes else _confirm))


@main.command()
@RUN
def status(run: Path) -> None:
    """Show where a chain on Slurm stands: states, attempts, loss, watts, energy, and why something waits.

    RUN is the run directory or the configuration file. Works from any login node; ends with code 6 when a stage failed.
    """
    from slurm.status import chain_status, show
    from slurm.steer import open_run

    found = chain_status(open_run(run))
    show(found)
    if any(stage.state == "failed" for stage in found.stages):
        click.get_current_context().exit(StageError.exit_code)


@main.command()
@RUN
@click.option("--every", default=5.0, show_default=True, help="Seconds between looks at Slurm.")
def watch(run: Path, every: float) -> None:
    """Show `status` live, until the chain is over. Ctrl-C ends only the looking."""
    from slurm.status import watch_chain
    from slurm.steer import open_run

    watch_chain(open_run(run), every)


@main.command()
@RUN
@click.argument("stage")
@click.option("--rank", type=click.IntRange(min=0), help="A rank; by default the first one that failed, then rank 0.")
@click.option("--follow", is_flag=True, help="Go on with new lines until the stage ends.")
def logs(run: Path, stage: str, rank: int | None, follow: bool) -> None:
    """Show the logs of a stage: the traceback of the rank that failed first, then the end of the log."""
    from slurm import steer

    directory = steer.open_run(run)
    for line in steer.logs(directory, stage, rank):
        click.echo(line)
    if follow:
        for line in steer.follow(directory, stage, rank):
            click.echo(line)


@main.command()
@RUN
@click.argument("stages", nargs=-1)
def cancel(run: Path, stages: tuple[str, ...]) -> None:
    """Cancel the waiting and running jobs of a chain, or of some stages. Checkpoints stay; `resume` goes on."""
    from slurm import steer

    for name, job in steer.cancel(steer.open_run(run), stages).items():
        click.echo(f"{name}: cancelled job {job}")


@main.command()
@RUN
@click.argument("stage")
@YES
def retry(run: Path, stage: str, yes: bool) -> None:
    """Submit a failed stage again, and what depends on it, with a fresh count of crashes."""
    from slurm import steer

    _submitted(steer.resubmit(steer.open_run(run), [stage], None if yes else _confirm))


@main.command()
@RUN
@YES
def resume(run: Path, yes: bool) -> None:
    """Submit everything that is neither done nor on its way."""
    from slurm import steer

    _submitted(steer.resubmit(steer.open_run(run), (), None if yes else _confirm))


@main.command()
@RUN
@click.argument("stage")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--step", type=click.IntRange(min=1), help="Of the checkpoint; by default the newest that verifies.")
def export(run: Path, stage: str, out: Path, step: int | None) -> None:
    """Write a checkpoint of a pretraining stage as a plain transformers folder, also while it trains.

    Reads checkpoints of any number of ranks, without a GPU; every expert is compared with what was written.
    """
    from hpc.stages.export import export_stage
    from slurm.steer import open_run

    taken = export_stage(open_run(run), stage, out, step)
    click.echo(f"{out}: {stage} after {taken} steps")


@main.command()
@CONFIG
@SITE
@SET
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def plan(config: Path, site: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what would run: resources, steps, parameters, memory, FLOPs, expected time and energy.

    Pure arithmetic: nothing is started and no deep-learning library is loaded.
    """
    from hpc.plan.show import render

    _, _, planned = _load(config, site, overrides)
    click.echo(json.dumps(planned.to_json(), indent=1) if as_json else render(planned))


@main.command()
@click.argument("key")
def explain(key: str) -> None:
    """Explain a configuration key, such as train.router.top_k or tracking.wandb."""
    from hpc.config.explain import explain as text_for

    click.echo(text_for(key))


@main.command()
def schema() -> None:
    """Print the JSON schema of configuration files, for editors (configs/schema.json)."""
    from hpc.config.explain import schema as json_schema

    click.echo(json.dumps(json_schema(), indent=1))


@main.group()
def devcluster() -> None:
    """A real Slurm with several nodes on this machine, for tests and rehearsals.

    \b
      python launch.py devcluster up
      eval "$(python launch.py devcluster env)"
      python launch.py submit configs/quickstart.yaml --site devcluster
    """


BOX = click.option("--box", type=click.Path(path_type=Path), help="Folder of the cluster; one per user by default.")


def _cluster(box: Path | None) -> Any:
    from slurm.devcluster.cluster import Cluster, default_root

    return Cluster.load(box or default_root())


@devcluster.command("up")
@BOX
@click.option("--nodes", default=4, show_default=True, type=click.IntRange(1, 100))
@click.option("--cpus", default=4, show_default=True, help="CPUs that each node claims to have.")
@click.option("--mode", type=click.Choice(["netns", "multi"]), help="netns as root: nodes with a network of their own.")
@click.option("--accounting", is_flag=True, help="With slurmdbd and MariaDB, so that sacct answers.")
def devcluster_up(box: Path | None, nodes: int, cpus: int, mode: Any, accounting: bool) -> None:
    """Start it; a cluster that is there is replaced."""
    import os

    from slurm.devcluster.cluster import Cluster, default_root
    from slurm.devcluster.files import Layout

    chosen = mode or ("netns" if os.getuid() == 0 else "multi")
    cluster = Cluster.up(Layout(str(box or default_root()), chosen, nodes, cpus, accounting=accounting))
    click.echo(
        f"{nodes} nodes are up after {cluster.seconds['total']:.1f} s ({chosen}), files in {cluster.layout.path}"
    )
    click.echo('next: eval "$(python launch.py devcluster env)"')


@devcluster.command("env")
@BOX
def devcluster_env(box: Path | None) -> None:
    """Print what a shell needs to use it: eval "$(python launch.py devcluster env)"."""
    for name, value in _cluster(box).environment().items():
        click.echo(f"export {name}={value}")


@devcluster.command("status")
@BOX
def devcluster_status(box: Path | None) -> None:
    """Show its nodes."""
    for name, state in _cluster(box).node_states().items():
        click.echo(f"{name}: {state}")


@devcluster.command("down")
@BOX
def devcluster_down(box: Path | None) -> None:
    """End it and remove its files."""
    _cluster(box).down()


def _node_verb(name: str, text: str) -> None:
    @devcluster.command(name, help=text)
    @click.argument("node")
    @BOX
    def verb(node: str, box: Path | None) -> None:
        getattr(_cluster(box), name.replace("-", "_"))(node)


_node_verb("kill-node", "Power failure of a node: slurmd and all ranks on it end at once.")
_node_verb("kill-slurmd", "Kill only the daemon of a node; ranks go on (split brain).")
_node_verb("start-node", "Switch a node on again.")
_node_verb("mark-down", "Tell the controller that a node is down, before it notices.")


@main.group()
def bench() -> None:
    """Measure this software against a limit or a peer, in one run."""


@bench.command()
@click.option("--repeats", default=7, show_default=True, help="Runs of each command; medians are shown.")
def startup(repeats: int) -> None:
    """CPU time of --help and plan, against their limits of 0.5 s and 1 s."""
    from slurm.bench import startup as measure

    click.echo(measure(repeats))


@bench.command("data")
@click.option("--seconds", default=1.0, show_default=True, help="Length of each measurement; there are five per side.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def bench_data(seconds: float, as_json: bool) -> None:
    """Tokens a second of the data loader beside litdata and grain, its part of a training step, and time to seek."""
    from hpc.bench import data

    found = data.measure(seconds)
    click.echo(json.dumps(found) if as_json else data.show(found))


@bench.command("checkpoint")
@click.option("--rounds", default=4, show_default=True, type=click.IntRange(1), help="Saves of each kind.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where checkpoints are written: the file system to measure; a temporary one by default.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def bench_checkpoint(rounds: int, folder: Path | None, as_json: bool) -> None:
    """How long training stands still for a checkpoint: in the background against synchronously. Takes a minute."""
    from hpc.bench.checkpoint import measure, show

    figures = measure(rounds, folder)
    click.echo(show(figures))
    if as_json:
        click.echo(json.dumps(figures))


@bench.command("train")
@click.option("--ranks", default=1, show_default=True, help="Processes of each side, one thread each.")
@click.option("--quick", is_flag=True, help="Half the tokens, 8 and 32 experts only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    default="wall",
    show_default=True,
    help="CPU seconds on a machine that others use.",
)
def bench_train(ranks: int, quick: bool, as_json: bool, clock: Any) -> None:
    """Our engine against other trainers in turns, and our expert layer against the dense-GEMM limit."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from hpc.bench.train import bench as measure
    from slurm.submit import RANK_ENVIRONMENT

    told = measure(RANK_ENVIRONMENT, ranks, quick, clock, click.echo)
    if as_json:
        click.echo(json.dumps(told))


def _confirm(question: str) -> bool:
    from hpc.errors import ConfigError

    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Add --yes to submit it from a script")
    return click.confirm(f"{question}\nSubmit?")


def _submitted(result: Any) -> None:
    for name, job in result.new.items():
        click.echo(f"{name}: submitted as job {job}")
    for name, job in result.alive.items():
        click.echo(f"{name}: on its way already as job {job}")
    if result.done:
        click.echo(f"done already: {', '.join(result.done)}")
    click.echo(f"run directory: {result.run.root}")
    click.echo(f"next: python launch.py watch {result.run.root}")


def _load(
    config: Path, site: str, overrides: tuple[str, ...], site_overrides: tuple[str, ...] = ()
) -> tuple[Any, Any, Any]:
    """Configuration, site and plan, checked against each other."""
    from hpc.config.load import load_config
    from hpc.plan.plan import plan as make_plan
    from slurm.site import load_site

    loaded = load_config(config, overrides)
    place = load_site(site, site_overrides)
    return loaded, place, make_plan(loaded, place.machine)


if __name__ == "__main__":
    sys.exit(main())
