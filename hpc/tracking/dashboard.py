"""`launch.py dashboard`: the saved W&B workspace of a chain, and the door to wandb-workspaces.

The specification is built without a server (`--json` prints it); saving it needs one. A second call replaces the same
saved view: RUN/dashboard.json remembers it. Panels choose their metrics by pattern, so that the number of nodes, layers
and experts need not be known. Runs are those of the chain's group, one per stage, sorted by their start and grouped by
the kind of stage; attempts show as steps of `attempt`, and what was done twice as `replayed`.

Private names of wandb-workspaces 0.4 are used for the specification and for the identity of a saved view, hence the pin
in pyproject.toml.
"""

import json
from pathlib import Path
from typing import Any

from hpc.errors import ConfigError, TrackingError
from hpc.run.directory import write_json
from hpc.tracking import wandb
from hpc.tracking.sync import stages
from hpc.tracking.ticket import Ticket

KWH, TOKENS, TIME, STEP = "energy_kwh", "tokens", "WallTime", "step"

Panel = dict[str, Any]
"""title, x, and either y (names) or pattern (a regular expression); bars: names of final figures."""

SECTIONS: dict[str, list[Panel]] = {
    "Loss": [
        {"title": "Loss against tokens", "x": TOKENS, "y": ["loss", "heldout_loss"]},
        {"title": "Loss against energy", "x": KWH, "y": ["loss", "heldout_loss"], "title_x": "kWh, all attempts"},
        {"title": "Gradient norm", "x": STEP, "y": ["grad_norm"]},
        {"title": "Learning rate", "x": STEP, "y": ["lr"]},
    ],
    "Energy": [
        {"title": "Watts per node", "x": TIME, "pattern": "^node_power_w/"},
        {"title": "Joules per node", "x": TIME, "pattern": "^node_energy_j/"},
        {"title": "Joules per token", "x": TOKENS, "y": ["j_per_token"]},
        {"title": "Energy of each stage, kWh", "bars": ["energy_kwh"]},
    ],
    "Speed": [
        {"title": "Tokens per second", "x": STEP, "y": ["tokens_per_s"]},
        {"title": "Model FLOPs utilisation", "x": STEP, "y": ["mfu"]},
        {"title": "Slowest ranks over the median", "x": STEP, "y": ["rank_step_p99_over_median"]},
        {"title": "Seconds by what they were spent on", "bars": ["goodput_s/productive", "goodput_s/start",
            "goodput_s/compile", "goodput_s/checkpoint", "goodput_s/replay", "goodput_s/lost", "goodput_s/idle",
            "goodput_s/queue"]},
    ],
    "Routing": [
        {"title": "Router entropy by layer (1 = even)", "x": STEP, "pattern": "^router_entropy/"},
        {"title": "Busiest expert over the mean, by layer", "x": STEP, "pattern": "^router_max_over_mean_by_layer/"},
        {"title": "Load per expert", "x": STEP, "pattern": "^router_load/"},
        {"title": "Assignments that reached no expert", "x": STEP, "y": ["router_dropped"]},
    ],
    "Attempts": [
        {"title": "Attempt", "x": TIME, "y": ["attempt"]},
        {"title": "Steps done again", "x": TIME, "y": ["replayed"]},
        {"title": "Goodput: productive part of the time", "bars": ["goodput"]},
        {"title": "Attempts of each stage", "bars": ["attempts"]},
    ],
}  # fmt: skip


def dashboard(run: Path) -> Any:
    """The workspace of a chain, not saved yet. Raises ConfigError where the chain has no W&B run."""
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports import v2 as wr

    ticket = _ticket(run)

    def panel(wanted: Panel) -> Any:
        if "bars" in wanted:
            return wr.BarPlot(title=wanted["title"], metrics=[wr.SummaryMetric(name) for name in wanted["bars"]])
        return wr.LinePlot(
            title=wanted["title"], x=wr.Metric(wanted["x"]), y=[wr.Metric(name) for name in wanted.get("y", [])],
            metric_regex=wanted.get("pattern"), title_x=wanted.get("title_x"), max_runs_to_show=100,
            smoothing_type="none",
        )  # fmt: skip

    return ws.Workspace(
        entity=ticket.entity or "",
        project=ticket.project,
        name=f"GreenMoE {ticket.group}",
        sections=[
            ws.Section(name=name, panels=[panel(wanted) for wanted in panels], is_open=True,
                       layout_settings=ws.SectionLayoutSettings(columns=2, rows=2))
            for name, panels in SECTIONS.items()
        ],
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group") == ticket.group],
            groupby=[ws.Metric("JobType"), ws.Metric("Name")],
            order=[ws.Ordering(ws.Metric("CreatedTimestamp"), ascending=True)],
        ),
    )  # fmt: skip


def specification(run: Path) -> dict[str, Any]:
    """What would be saved, as JSON."""
    view = dashboard(run)._to_model()
    spec: dict[str, Any] = json.loads(view.model_dump_json(by_alias=True, exclude_none=True))
    return spec


def save(run: Path) -> str:
    """Save the workspace, or replace the one that was saved before; returns its address. Raises TrackingError."""
    why = wandb.unreachable()
    if why:
        raise TrackingError(f"{wandb.server()} does not answer ({why}): --json prints the specification without it")
    workspace, known = dashboard(run), run / "dashboard.json"
    try:
        workspace.entity = workspace.entity or wandb.default_entity()
        if known.exists():
            before = json.loads(known.read_text(encoding="utf-8"))
            if before["server"] == wandb.server():
                workspace._internal_name, workspace._internal_id = before["name"], before["id"]
        workspace.save()
        address = str(workspace.url)
    except Exception as error:  # of many kinds, none of them ours
        text = " ".join(str(error).split())[:300]
        raise TrackingError(f"{wandb.server()} did not save the dashboard: {text}") from error
    saved = {"server": wandb.server(), "name": workspace._internal_name, "id": workspace._internal_id, "url": address}
    write_json(known, saved)
    return address


def _ticket(run: Path) -> Ticket:
    found = [Ticket.read(root) for root in stages(run)]
    if not found:
        raise ConfigError(f"{run} has nothing for W&B: no run directory, or tracking.wandb was disabled")
    return found[-1]
