"""report.html of the run, from receipts, metrics and energy files alone. artifact/: report.html (copied to RUN)."""

import os
import platform
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil

from hpc.config import Facility
from hpc.energy.footprint import footprint
from hpc.energy.ledger import StageLedger, power_series, stage_ledger
from hpc.run.receipt import code_version, read_receipt
from hpc.run.task import Context, Result
from hpc.tracking.metrics import history
from hpc.tracking.report import RunReport, StageReport, write_report


def run(context: Context) -> Result:
    """Do the stage."""
    context.progress("writing the page")
    artifact = context.directory.artifact
    artifact.mkdir(parents=True)
    page = artifact / "report.html"
    energies = [stage_ledger(context.input_directory(name).root) for name in context.task.stage.needs]
    report = RunReport(
        name=context.task.run,
        created=time.time(),
        code_version=" ".join(str(word) for word in code_version().values() if word),
        machine=describe_machine(),
        stages=[_stage_report(context, name) for name in context.task.stage.needs],
        facility_notes=facility_notes(context.task.facility, energies),
    )
    write_report(report, page)
    shutil.copyfile(page, Path(context.task.run_directory) / "report.html")
    return Result(
        {"stages": len(report.stages), "page_bytes": page.stat().st_size},
        {"stages": "measured: stages with a receipt", "page_bytes": "measured: size of report.html"},
        {},
        ("jinja2", "plotly"),
    )


def describe_machine() -> str:
    """Processor, cores and memory of this node."""
    model = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def facility_notes(facility: Facility, energies: list[StageLedger]) -> list[str]:
    """What the site states about its building and what follows for this run; empty when it states nothing."""
    stated = facility.model_dump(exclude={"source"}, exclude_none=True)
    notes = [f"{name} = {value} ({facility.source or 'source not stated'})" for name, value in stated.items()]
    known = [energy.energy_j for energy in energies if energy.energy_j is not None]
    if not stated or len(known) < len(energies):
        return notes
    node_hours = sum(energy.node_s for energy in energies) / 3600
    result = footprint(sum(known), node_hours, facility)
    for name, value in asdict(result).items():
        if value is not None:
            notes.append(f"derived for this run: {name} = {value:.4g}")
    return notes


def _stage_report(context: Context, name: str) -> StageReport:
    directory, receipt = context.input_directory(name), read_receipt(context.input_directory(name))
    assert receipt is not None  # inputs were verified
    energy = stage_ledger(directory.root)
    stage = next(stage for stage in context.task.stages if stage.name == name)
    return StageReport(
        name=name,
        kind=receipt.kind,
        needs=list(stage.needs),
        seconds=receipt.seconds,
        attempts=receipt.attempts,
        metrics=receipt.metrics,
        provenance=receipt.provenance,
        size_bytes=receipt.size_bytes,
        energy_j=energy.energy_j,
        energy_provenance="; ".join(energy.provenance) or "not measured",
        history=history(directory.metrics),
        power=power_series(directory.root),
    )
