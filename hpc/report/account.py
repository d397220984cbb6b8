"""Energy of a run as rows: where joules come from, what was lost, what the building adds by its site's statements."""

from typing import Any

from hpc.energy.footprint import Footprint, footprint, lines
from hpc.energy.ledger import StageLedger
from hpc.report.facts import RunFacts, StageFacts, provenance_kind, total


def sources(run: RunFacts) -> list[dict[str, Any]]:
    """Where joules come from: {source, kind, stages}, estimates first."""
    found: dict[str, list[str]] = {}
    for stage in run.ledger.stages if run.ledger else ():
        for source in stage.provenance:
            found.setdefault(source, []).append(stage.name)
    rows = [{"source": key, "kind": provenance_kind(key), "stages": names} for key, names in found.items()]
    return sorted(rows, key=lambda row: (row["kind"] != "estimated", row["source"]))


def notes(run: RunFacts) -> list[tuple[str, list[str]]]:
    """What the samplers had to say, and on which nodes: parts that nothing measures, other users, restarts."""
    found: dict[str, dict[str, None]] = {}
    for stage in run.ledger.stages if run.ledger else ():
        for node in stage.nodes:
            for note in node.notes:
                found.setdefault(note, {})[node.host] = None
    return [(note, list(hosts)) for note, hosts in found.items()]


def unsure_j(run: RunFacts) -> float:
    """At most so many joules more were drawn than the ledger has, where counters were silent."""
    return sum(node.unsure_j for stage in (run.ledger.stages if run.ledger else ()) for node in stage.nodes)


def footprints(run: RunFacts) -> list[dict[str, Any]]:
    """The footprint of each site that stages ran on: {stages, kwh, node_hours, lines, location}.

    What superseded stages drew is on the bill of the site of the stage that replaced them.
    """
    groups: dict[str, list[StageFacts]] = {}
    for stage in run.stages:
        if stage.ledger is not None:
            groups.setdefault(stage.facility.model_dump_json(), []).append(stage)
    found = []
    for stages in groups.values():
        ledgers = [s.ledger for s in stages if s.ledger] + replaced(run, stages)
        drawn, hours = total([one.energy_j for one in ledgers]), sum(one.node_s for one in ledgers) / 3600
        facility = stages[0].facility
        part = footprint(drawn, hours, facility) if drawn is not None else None
        rows = lines(part, hours, facility) if part else []
        found.append(
            {"stages": [s.name for s in stages], "drawn": drawn, "node_hours": hours, "lines": rows, "part": part,
             "location": facility.location, "stated": bool(facility.stated())}
        )  # fmt: skip
    return found


def replaced(run: RunFacts, stages: list[StageFacts]) -> list[StageLedger]:
    """Ledgers of what these stages superseded."""
    names = tuple(f"{stage.name} (superseded " for stage in stages)
    return [one for one in (run.ledger.stages if run.ledger else ()) if one.name.startswith(names)]


def whole_footprint(run: RunFacts) -> Footprint | None:
    """Of all sites together; a figure that one of them does not state is unknown."""
    parts = [group["part"] for group in footprints(run)]
    if not parts or any(part is None for part in parts):
        return None
    result: Footprint = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def emissions_kg(run: RunFacts) -> float | None:
    """CO2e of the run's electricity, kg, as far as its sites' figures reach; None unless every site states one."""
    grams = [group["part"].emissions_g if group["part"] else None for group in footprints(run)]
    whole = total(grams)
    return None if whole is None else whole / 1e3


def lost_rows(run: RunFacts) -> list[dict[str, Any]]:
    """Work that made nothing that stayed, the most expensive first."""
    kinds = {"failed_attempt": "attempt that failed", "replayed_steps": "steps done again", "superseded": "made again"}
    rows = [
        {"stage": stage.name, "what": kinds.get(lost.kind, lost.kind), "attempt": lost.attempt,
         "energy_j": lost.energy_j, "node_s": lost.node_s, "steps": lost.steps, "tokens": lost.tokens,
         "reason": lost.reason, "provenance": "; ".join(sorted(stage.provenance))}
        for stage in (run.ledger.stages if run.ledger else ()) for lost in stage.lost
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -(row["energy_j"] or 0.0))
