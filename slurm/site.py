"""One cluster, or one machine, as data: what it offers, how fast it is, what it draws, what its building states."""

from pathlib import Path

from hpc.config import Facility, Machine
from hpc.config.base import Frozen
from hpc.config.load import load_yaml_model
from hpc.config.near import nearest
from hpc.errors import ConfigError

SITES = Path(__file__).resolve().parent.parent / "configs" / "sites"


class Site(Frozen):
    """A place where stages run."""

    name: str
    """Short name, as `--site` takes it."""

    description: str
    """One line for people."""

    machine: Machine
    """One kind of node."""

    facility: Facility = Facility()
    """PUE, WUE and carbon, where the site states them."""


def load_site(name: str) -> Site:
    """The site of that name in configs/sites, or of a YAML file. Raises ConfigError."""
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        path = SITES / f"{name}.yaml"
        if not path.exists():
            raise ConfigError(
                f"--site {name!r} is not known{nearest(name, sorted(p.stem for p in SITES.glob('*.yaml')))}"
            )
    return load_yaml_model(path, Site)
