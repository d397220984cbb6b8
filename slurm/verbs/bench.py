"""The verbs of `launch.py bench`. `--json` prints one JSON object as the last line."""

import json
import os
from pathlib import Path
from typing import Any

import click

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
CLOCK = click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    default="wall",
    show_default=True,
    help="CPU seconds on a machine that others use.",
)


@click.group()
def bench() -> None:
    """Measure this software against a limit or a peer, in one run."""


@bench.command()
@click.option("--repeats", default=7, show_default=True, help="Runs of each command; medians are shown.")
def startup(repeats: int) -> None:
    """CPU time of --help, plan and fit, against their limits of 0.5 s and 1 s."""
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
@JSON
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
@JSON
@CLOCK
def bench_train(ranks: int, quick: bool, as_json: bool, clock: Any) -> None:
    """Our engine against other trainers in turns, and our expert layer against the dense-GEMM limit."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from hpc.bench.train import bench as measure
    from slurm.submit import RANK_ENVIRONMENT

    told = measure(RANK_ENVIRONMENT, ranks, quick, clock, click.echo)
    if as_json:
        click.echo(json.dumps(told))


@bench.command("energy")
@click.option("--seconds", default=20.0, show_default=True, type=click.FloatRange(3), help="How long to watch.")
@JSON
def bench_energy(seconds: float, as_json: bool) -> None:
    """CPU time and memory of the energy sampler itself, against its limit of 0.1 % of a core."""
    from hpc.bench.energy import measure, show

    found = measure(seconds)
    click.echo(show(found))
    if as_json:
        click.echo(json.dumps(found))


@bench.command("plan")
@click.option("--rows", type=click.Path(path_type=Path), help="CSV with runs of others; the published ones by default.")
@click.option("--fit", is_flag=True, help="Fit the constants again to the published rows first; takes minutes.")
@JSON
def bench_plan(rows: Path | None, fit: bool, as_json: bool) -> None:
    """Step time that the plan predicts against published runs on GPUs, with the median error."""
    from hpc.bench import plan

    if fit:
        from hpc.bench.plan_fit import write

        write()
    found = plan.score(rows)
    click.echo(plan.show(found))
    if as_json:
        click.echo(json.dumps(found))


@bench.command("reuse")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Turns of each loader.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where the checkpoint of 0.9 GB is written meanwhile; a temporary one by default.",
)
@JSON
def bench_reuse(rounds: int, folder: Path | None, as_json: bool) -> None:
    """The most memory that a rank holds while a checkpoint is loaded, against what it keeps; and from_pretrained."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from hpc.bench.reuse import measure, show
    from slurm.submit import RANK_ENVIRONMENT

    found = measure(RANK_ENVIRONMENT, rounds=rounds, say=click.echo, folder=folder)
    click.echo(show(found))
    if as_json:
        click.echo(json.dumps(found))


@bench.command("wandb")
@click.option("--rounds", default=16, show_default=True, type=click.IntRange(1), help="Turns of each trainer.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="Steps of a turn.")
@JSON
@CLOCK
def bench_wandb(rounds: int, steps: int, as_json: bool, clock: Any) -> None:
    """What W&B costs a step: disabled, offline, online, and online with a server that hangs, in turns. Limit 1.01."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from hpc.bench.wandb import bench as measure
    from slurm.submit import RANK_ENVIRONMENT

    told = measure(RANK_ENVIRONMENT, rounds, steps, clock, click.echo)
    if as_json:
        click.echo(json.dumps(told))


@bench.command("shrink")
@click.option("--quick", is_flag=True, help="A mixture trained for 60 steps, in three formats: two minutes.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the runs stay, to be looked at or gone on with (10 GB); a temporary one by default.",
)
@JSON
def bench_shrink(quick: bool, folder: Path | None, as_json: bool) -> None:
    """Three models in every format: size, loss, speed, joules, and what making it took. About 25 minutes."""
    import tempfile

    from hpc.bench.claims.claim import Bench
    from hpc.bench.shrink import measure
    from hpc.bench.shrink_show import show
    from slurm.site import load_site

    with tempfile.TemporaryDirectory() as temporary:
        tables, load = measure(
            Bench(
                machine=lambda name: load_site(name).machine,
                folder=(folder or Path(temporary)).absolute(),
                quick=quick,
                tell=lambda text: click.echo(text, err=True),
            )
        )
    click.echo(show(tables))
    click.echo(f"{load.told.name}: {load.largest:.1f} ({load.told.provenance})")
    if as_json:
        told = {"models": [table.to_json() for table in tables], "load": load.largest}
        click.echo(json.dumps(told))


@bench.command("claims")
@click.option("--only", multiple=True, metavar="NAME", help="This claim; several times for several. All by default.")
@click.option("--quick", is_flag=True, help="Cut real runs to two minutes together: how it works, not what is so.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where real runs stay, to be looked at or gone on with; a temporary one by default.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a page.")
def bench_claims(only: tuple[str, ...], quick: bool, folder: Path | None, as_json: bool) -> None:
    """Claims about greener AI: re-run here where that can be done, else recomputed, each with an honest verdict.

    All of them take about 45 minutes on two cores that do nothing else; the ones on paper a second.
    """
    import tempfile

    from hpc.bench.claims.claim import Bench
    from hpc.bench.claims.page import page
    from hpc.bench.claims.registry import audit, chosen
    from slurm.site import load_site

    chosen(only)
    with tempfile.TemporaryDirectory() as temporary:
        found = audit(
            only,
            Bench(
                machine=lambda name: load_site(name).machine,
                folder=(folder or Path(temporary)).absolute(),
                quick=quick,
                tell=lambda text: click.echo(text, err=True),
            ),
        )
    claims = {"claims": [claim.to_json() for claim in found]}
    click.echo(json.dumps(claims) if as_json else page(found))
