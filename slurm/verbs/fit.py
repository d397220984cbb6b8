"""The verb `launch.py fit`: on which machine a model runs, in which format, how fast, and at what cost in loss."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("model")
@click.option("--memory", metavar="16GiB", help="Memory of the machine; alone it means the M2 Mac with so much.")
@click.option("--bandwidth", metavar="100GB/s", help="Memory bandwidth, where it is not the device's own.")
@click.option("--context", type=click.IntRange(1, 2**24), metavar="N",
              help="Tokens of the conversation; 8,192 by default, or what the model was made for.")  # fmt: skip
@click.option("--device", metavar="NAME", help="'M2 Max', 'M4', 'H100', 'A100-40GB', ...; all its memory options.")
@click.option("--stage", help="Stage of a run directory or of a chain's YAML file.")
@click.option("--measured", type=click.Path(path_type=Path), metavar="FILE",
              help="CSV with measured costs beside the published ones, as `bench shrink` writes it.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def fit(
    model: str, memory: str | None, bandwidth: str | None, context: int | None, device: str | None, stage: str | None,
    measured: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Show which formats of a model fit a Mac, a GPU or any machine, how fast it answers there, and what it costs.

    MODEL is a model's folder, a stage of a run (RUN/stages/NAME), a .gguf file, a Hub id in this machine's cache, a
    chain's YAML file, or a model known by name (mixtral-8x7b, qwen3-30b-a3b, olmoe-1b-7b, deepseek-v3, ...). Without
    --memory and --device: the M2 Macs from 8 to 192 GiB. Arithmetic only: nothing is loaded or downloaded.
    """
    from hpc.plan.inference import machines
    from hpc.plan.inference.assess import assess, context_of
    from hpc.plan.inference.cost import read_costs
    from hpc.plan.inference.show import render
    from hpc.plan.inference.subject import find

    places = machines.machines(
        device, machines.memory_gib(memory) if memory else None, machines.bandwidth(bandwidth) if bandwidth else None
    )
    subject = find(model, stage)
    costs = [*read_costs(), *(read_costs(measured) if measured else [])]
    length = context_of(subject, context)
    fits = [assess(subject, place, length, costs) for place in places]
    if as_json:
        told = {"model": subject.name, "shape_from": subject.source, "machines": [found.to_json() for found in fits]}
        click.echo(json.dumps(told, indent=1))
    else:
        click.echo(render(fits, costs))
