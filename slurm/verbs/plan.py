"""The verb `launch.py plan`: what would run, what else could, and what was measured for it."""

import json
from pathlib import Path
from typing import Any, Literal

import click

BUSY = 0.7
"""Part of a core that a rank has on a machine of its own, at least; the rest is waiting for other ranks."""
CONFIG = click.argument("config", type=click.Path(path_type=Path))


@click.command()
@CONFIG
@click.option("--site", default="local", show_default=True, help="A site of configs/sites, or a YAML file.")
@click.option("--set", "overrides", multiple=True, metavar="A.B.C=VALUE",
              help="Override a key, e.g. stages.pretrain.train.steps=50.")  # fmt: skip
@click.option("--site-set", "site_overrides", multiple=True, metavar="A.B=VALUE",
              help="Override a key of the site, e.g. machine.node_mtbf_hours=20000.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--detail", metavar="STAGE", help="Every figure of a training stage with its formula and source.")
@click.option("--search", is_flag=True, help="Layouts that fit the site, best first, and why the others do not.")
@click.option("--stage", help="Stage to search; by default the one with most FLOPs.")
@click.option("--by", type=click.Choice(["time", "energy"]), default="time", show_default=True,
              help="What --search ranks by.")  # fmt: skip
@click.option(
    "--calibrate", is_flag=True, help="Do a few real training steps here first (a minute) and plan with them."
)
@click.option("--measured", type=click.Path(path_type=Path), metavar="RUN",
              help="Plan with the speeds and router loads of an earlier run of this machine.")  # fmt: skip
@click.option("--passport", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Router loads of a trained stage, e.g. RUN/stages/pretrain.")  # fmt: skip
def plan(
    config: Path, site: str, overrides: tuple[str, ...], site_overrides: tuple[str, ...], as_json: bool,
    detail: str | None, search: bool, stage: str | None, by: Literal["time", "energy"], calibrate: bool,
    measured: Path | None, passport: Path | None,
) -> None:  # fmt: skip
    """Show what would run: resources, steps, parameters, memory, FLOPs, expected time and energy.

    Arithmetic only: nothing is started (but by --calibrate) and no deep-learning library is loaded.
    """
    from hpc.config.load import load_config
    from hpc.plan.detail import render_detail
    from hpc.plan.layouts import search as search_layouts
    from hpc.plan.plan import plan as make_plan
    from hpc.plan.show import render, render_search
    from slurm.site import load_site

    loaded, place = load_config(config, overrides), load_site(site, site_overrides)
    known = _measured(loaded, place, measured, passport, calibrate=calibrate)
    if search or stage:
        found = search_layouts(loaded, place.machine, known, stage, by)
        click.echo(json.dumps(found.to_json(), indent=1) if as_json else render_search(found))
        return
    planned = make_plan(loaded, place.machine, place.facility, known)
    if as_json:
        click.echo(json.dumps(planned.to_json(), indent=1))
    elif detail:
        click.echo(render_detail(loaded, planned, place.machine, known, detail))
    else:
        click.echo(render(planned))


def _measured(config: Any, site: Any, run: Path | None, passport: Path | None, *, calibrate: bool) -> Any:
    """What was measured, from everywhere it was asked for; steps done now count before those of a run."""
    from dataclasses import replace

    from hpc.plan.calibration import Measured, from_run
    from hpc.plan.imbalance import from_passport

    found = from_run(run, site.machine) if run else Measured()
    if passport:
        found = replace(found, histogram=from_passport(passport))
    if calibrate:
        now = _calibrate(config, site)
        found = replace(found, rates={**found.rates, **now.rates}, source=found.source or now.source)
    return found


def _calibrate(config: Any, site: Any) -> Any:
    from hpc.bench.step import measure_steps
    from hpc.plan.calibration import from_steps, to_measure
    from slurm.submit import RANK_ENVIRONMENT

    speeds = {}
    for kind, (stage, facts) in to_measure(config).items():
        click.echo(f"measuring steps of {stage.name} ...", err=True)
        told = measure_steps(
            stage.train, facts.model, facts.router, facts.vocab_size, RANK_ENVIRONMENT, site.machine.device,
            steps=8, warm_up=12,  # with as few as two, kernels for new shapes were still being made
        )  # fmt: skip
        peak = max(told.peak_memory_bytes) / 2**30
        click.echo(f"{stage.name}: {told.tokens_per_s:,.0f} tokens/s, at most {peak:.2f} GiB on a rank", err=True)
        if site.machine.device != "cuda" and told.cpu_share < BUSY:
            click.echo(
                f"  ranks had {told.cpu_share:.0%} of a core each: the machine is in use, so what is measured is slow",
                err=True,
            )
        speeds[kind] = (facts, stage.train, told.tokens_per_s)
    return from_steps(speeds, site.machine)
