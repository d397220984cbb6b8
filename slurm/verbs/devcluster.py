"""The verbs of `launch.py devcluster`."""

import os
from pathlib import Path
from typing import Any

import click


@click.group()
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
@click.option("--power", metavar="W,W,...", help="Watts of each node, fed into pm_counters of its own (netns).")
def devcluster_up(
    box: Path | None, nodes: int, cpus: int, mode: Any, accounting: bool, power: str | None
) -> None:  # fmt: skip
    """Start it; a cluster that is there is replaced."""
    from slurm.devcluster.cluster import Cluster, default_root
    from slurm.devcluster.files import Layout

    chosen: Any = mode or ("netns" if os.getuid() == 0 else "multi")
    watts = _watts(power) if power else ()
    layout = Layout(str(box or default_root()), chosen, nodes, cpus, accounting=accounting, power_w=watts)
    cluster = Cluster.up(layout)
    click.echo(
        f"{nodes} nodes are up after {cluster.seconds['total']:.1f} s ({chosen}), files in {cluster.layout.path}"
    )
    named = f" --box {box}" if box else ""
    click.echo(f'next: eval "$(python launch.py devcluster env{named})"')


def _watts(text: str) -> tuple[float, ...]:
    from hpc.errors import ConfigError

    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"--power {text}: expected watts such as 100,200,300,400, one for each node") from None


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
