#!/usr/bin/env python
"""GreenMoE: one YAML file from raw text to a quantized mixture-of-experts model, with its energy."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from hpc.errors import EXIT_CODES, GreenMoEError

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
@CONFIG
@click.option("--site", required=True, help="A site of configs/sites, or a YAML file of your own.")
@SITE_SET
@SET
@click.option("--dry-run", is_flag=True, help="Print the sbatch text of every job and submit nothing.")
@click.option("--yes", is_flag=True, help="Do not ask, whatever it may cost.")
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
def bench() -> None:
    """Measure this software against a limit or a peer, in one run."""


@bench.command()
@click.option("--repeats", default=7, show_default=True, help="Runs of each command; medians are shown.")
def startup(repeats: int) -> None:
    """CPU time of --help and plan, against their limits of 0.5 s and 1 s."""
    from slurm.bench import startup as measure

    click.echo(measure(repeats))


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
