#!/usr/bin/env python
"""GreenMoE: one YAML file from raw text to a quantized mixture-of-experts model, with its energy."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from hpc.errors import EXIT_CODES, GreenMoEError, StageError
from slurm.verbs.bench import bench
from slurm.verbs.chat import chat
from slurm.verbs.devcluster import devcluster
from slurm.verbs.fit import fit
from slurm.verbs.plan import plan
from slurm.verbs.rehearse import rehearse
from slurm.verbs.report import card, report

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

    loaded, place, planned = _load(config, site, overrides)
    directory = run_chain(loaded, place, planned)
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
    planned = make_plan(load_config(config), place.machine, place.facility) if config else None
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: joules and seconds.")
def ledger(run: Path, as_json: bool) -> None:
    """Show every joule of a run: per stage, attempt and node, useful apart from lost, and what is missing.

    Beside it goodput, the footprint where the site states one, what was inherited from other runs, and sacct's figure.
    """
    from slurm import ledger as ledgers
    from slurm.steer import open_run

    directory = open_run(run)
    found = ledgers.look(directory)
    if as_json:
        click.echo(json.dumps(ledgers.to_json(directory, found)))
    else:
        ledgers.show(directory, found)


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
@SET
@YES
def retry(run: Path, stage: str, overrides: tuple[str, ...], yes: bool) -> None:
    """Submit a failed stage again, and what depends on it, with a fresh count of crashes."""
    from slurm import steer

    _submitted(steer.resubmit(steer.open_run(run), [stage], None if yes else _confirm, overrides))


@main.command()
@RUN
@SET
@YES
def resume(run: Path, overrides: tuple[str, ...], yes: bool) -> None:
    """Submit everything that is neither done nor on its way."""
    from slurm import steer

    _submitted(steer.resubmit(steer.open_run(run), (), None if yes else _confirm, overrides))


@main.command()
@RUN
@click.argument("stage")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--step", type=click.IntRange(min=1), help="Of the checkpoint; by default the newest that verifies.")
def export(run: Path, stage: str, out: Path, step: int | None) -> None:
    """Write a model of a run as a plain folder with its card (README.md): a checkpoint, or a finished stage's model.

    A pretraining stage is exported while it trains, from checkpoints of any number of ranks, without a GPU; every
    expert is compared with what was written. Of other stages (merge, quantize, lora) the verified artifact is copied.
    """
    from hpc.stages.model_folder import export_stage
    from slurm.steer import open_run

    taken = export_stage(open_run(run), stage, out, step)
    click.echo(f"{out}: {taken}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--timeout", default=120.0, show_default=True, type=click.FloatRange(1), help="Seconds for each stage.")
def sync(runs: tuple[Path, ...], timeout: float) -> None:
    """Send to W&B what the stages of some runs could not send themselves, from a login node.

    Asks the server what it holds and sends the rest, then the edges between artifacts. Call it as often as you like:
    nothing goes twice, and a stage that was cut short goes on. Ends with code 13 when something is left.
    """
    from hpc.tracking.sync import sync as send

    send(list(runs), timeout, lambda stage: click.echo(str(stage)))


@main.command()
@RUN
@click.option("--json", "as_json", is_flag=True, help="Print the specification; no server is asked.")
def dashboard(run: Path, as_json: bool) -> None:
    """Save a W&B workspace for a run: loss against tokens and kWh, watts per node, routing, goodput, attempts.

    A second call replaces the same saved view.
    """
    from hpc.tracking import dashboard as made

    click.echo(json.dumps(made.specification(run), indent=1) if as_json else made.save(run))


main.add_command(plan)
main.add_command(rehearse)
main.add_command(fit)


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
    return loaded, place, make_plan(loaded, place.machine, place.facility)


main.add_command(report)
main.add_command(card)
main.add_command(chat)
main.add_command(devcluster)
main.add_command(bench)

if __name__ == "__main__":
    sys.exit(main())
