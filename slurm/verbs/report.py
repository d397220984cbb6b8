"""The verbs that tell what a run was: `report` of one run or several, `card` of a model."""

from pathlib import Path
from typing import Any

import click

OUT = click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Where to write instead.")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN [RUN ...]")
@OUT
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write report.html of a run from what is there, at any time; of several runs, one page side by side.

    RUN is a run directory or its configuration file. One run's page is RUN/report.html; a comparison is compare.html
    beside the first run's directory. The pages need no network.
    """
    told = [_facts(run) for run in runs]
    first = Path(told[0].root)
    if len(told) == 1:
        from hpc.report.page import write_report

        path = out or first / "report.html"
        write_report(told[0], path)
    else:
        from hpc.report.compare import write_comparison

        path = out or first.parent / "compare.html"
        write_comparison(told, path)
    click.echo(f"report: {path}")


def _facts(run: Path) -> Any:
    """What the directory of a run tells, its joules beside those of Slurm's accounting where that answers here."""
    from hpc.errors import ArtifactError
    from hpc.report.gather import gather
    from slurm import ledger
    from slurm.steer import open_run

    directory = open_run(run)
    try:
        return gather(directory.root, ledger.look(directory))
    except ArtifactError:  # a damaged receipt: the page names it
        return gather(directory.root)


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.argument("stage")
@OUT
def card(run: Path, stage: str, out: Path | None) -> None:
    """Write the model card of a finished stage: README.md as the Hugging Face Hub reads it.

    What it is, how it was made, held-out loss, every joule and where it comes from, carbon if the site states it.
    Without --out it is printed.
    """
    from hpc.report.card import write_card
    from hpc.run.directory import write_atomic
    from slurm.steer import open_run

    text = write_card(open_run(run).root, stage)
    if out is None:
        click.echo(text, nl=False)
        return
    write_atomic(out, text)
    click.echo(f"card: {out}")
