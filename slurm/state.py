"""What became of each stage, read from the run directory alone, and what that means for the next launch."""

from dataclasses import dataclass
from typing import Any, Literal

from hpc.config import RunConfig, Stage
from hpc.config.gate import Gate
from hpc.run.directory import RunDirectory
from hpc.run.receipt import Receipt, read_receipt, verify
from hpc.run.task import TaskFile, asked, asked_to_learn


@dataclass(frozen=True)
class Decision:
    """What a launch does with a stage, and why."""

    action: Literal["reuse", "run", "resume", "again"]
    """reuse: its receipt is valid; run: nothing is there; resume: an attempt was cut short; again: what it was made
    from has changed."""
    reason: str


def decide(run: RunDirectory, config: RunConfig, stage: Stage) -> Decision:
    """Decide about one stage whose inputs are done. Raises ArtifactError for a damaged artifact of a finished stage."""
    directory = run.stage(stage.name)
    receipt = read_receipt(directory)
    inputs = input_digests(run, stage)
    if receipt is not None:
        change = describe_change(receipt.config, asked(stage, config.seed), receipt.inputs, inputs)
        if change:
            return Decision("again", change)
        verify(directory, receipt)
        return Decision("reuse", "its receipt is valid")
    if not directory.task.exists():
        return Decision("run", "not done yet")
    task = TaskFile.read(directory.task)
    before, now = asked_to_learn(task.stage, task.seed), asked_to_learn(stage, config.seed)
    change = describe_change(before, now, task.inputs, inputs)
    if change:
        return Decision("again", change)
    return Decision("resume", "an earlier attempt did not finish")


def input_digests(run: RunDirectory, stage: Stage) -> dict[str, str]:
    """Digest of every artifact a stage reads; '' for one that is not there yet."""
    receipts: dict[str, Receipt | None] = {name: read_receipt(run.stage(name)) for name in stage.needs}
    return {name: receipt.digest if receipt else "" for name, receipt in receipts.items()}


def missed_gate(run: RunDirectory, stage: Stage) -> str | None:
    """Why a stage must not run although its needs are done; None when its gates hold."""
    receipts = {name: read_receipt(run.stage(name)) for name in stage.needs}
    metrics = {name: receipt.metrics for name, receipt in receipts.items() if receipt}
    return next((reason for gate in stage.gate if (reason := Gate.parse(gate).missed(metrics))), None)


def describe_change(
    before: dict[str, Any], now: dict[str, Any], inputs_before: dict[str, str], inputs_now: dict[str, str]
) -> str | None:
    """Why a stage has to be made again, in one phrase; None when nothing it depends on has changed."""
    old, new = _flat(before), _flat(now)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        return f"{key} changed from {old.get(key)} to {new.get(key)}{more}"
    for name in {**inputs_before, **inputs_now}:
        if name not in inputs_now or name not in inputs_before:
            return f"its needs changed: {name}"
        if inputs_before[name] != inputs_now[name]:
            return f"its input {name} changed"
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {key: leaf for name, inner in value.items() for key, leaf in _flat(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}
