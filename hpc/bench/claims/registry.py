"""Finds the entries: every module of this folder that has an `ENTRY`, in the order of their file names."""

from importlib import import_module
from pkgutil import iter_modules

from hpc.bench import claims
from hpc.bench.claims.claim import Bench, Claim, Entry
from hpc.config.near import nearest
from hpc.errors import ConfigError


def entries() -> list[Entry]:
    """All entries."""
    modules = [import_module(f"{claims.__name__}.{module.name}") for module in iter_modules(claims.__path__)]
    return [module.ENTRY for module in modules if hasattr(module, "ENTRY")]


def chosen(names: tuple[str, ...]) -> list[Entry]:
    """The entries of these names, all of them without any. Raises ConfigError."""
    known = {entry.name: entry for entry in entries()}
    for name in names:
        if name not in known:
            raise ConfigError(f"--only {name}: there is no such claim{nearest(name, list(known))}")
    return [known[name] for name in names or known]


def audit(names: tuple[str, ...], bench: Bench) -> list[Claim]:
    """Audit the chosen claims one after the other. Raises ConfigError, or what a real run ends with."""
    return [entry.audit(bench) for entry in chosen(names)]
