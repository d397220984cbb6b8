"""Whether a plan keeps within the energy budgets that its run states, before a node-hour is spent.

An estimate above a budget is refused: training would stop before its end. Above NEAR of it, and where the energy is
not known beforehand, the plan warns: estimates are rough, and the running stage stops at its budget whatever they said.
"""

from collections.abc import Iterator, Mapping

from hpc.config import RunConfig
from hpc.errors import ConfigError

NEAR = 0.8
JOULES_PER_KWH = 3.6e6


def check_budgets(config: RunConfig, energy_j: Mapping[str, float | None]) -> tuple[str, ...]:
    """Warnings about budgets that may not suffice. energy_j: stage -> its estimate, J.

    Raises ConfigError for one that cannot, with a way out.
    """
    return tuple(_check(config, energy_j))


def _check(config: RunConfig, energy_j: Mapping[str, float | None]) -> Iterator[str]:
    for stage in config.stages:
        if stage.energy_budget_kwh is not None:
            key = f"stages.{stage.name}.energy_budget_kwh"
            yield from _compare(
                f"stage {stage.name!r}", key, stage.energy_budget_kwh, {stage.name: energy_j[stage.name]}
            )
    if config.energy_budget_kwh is not None:
        yield from _compare("the run", "energy_budget_kwh", config.energy_budget_kwh, energy_j)


def _compare(what: str, key: str, budget_kwh: float, energy_j: Mapping[str, float | None]) -> Iterator[str]:
    known = sum(value for value in energy_j.values() if value is not None) / JOULES_PER_KWH
    unknown = [name for name, value in energy_j.items() if value is None]
    if known > budget_kwh:
        raise ConfigError(
            f"{what} would draw about {known:.3g} kWh (estimated), but {key} = {budget_kwh:g}: plan fewer steps or a "
            f"smaller model, or raise it: --set {key}={1.25 * known:.2g}"
        )
    if unknown:
        yield (
            f"warning: what {', '.join(unknown)} will draw is not known beforehand; {key} = {budget_kwh:g} is kept by "
            "stopping when it is spent"
        )
    elif known > NEAR * budget_kwh:
        yield f"warning: {what} would draw about {known:.3g} kWh (estimated), {key} = {budget_kwh:g} may not suffice"
