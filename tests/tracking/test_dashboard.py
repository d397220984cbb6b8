"""The saved workspace: its panels show what is logged, and a second call replaces the first."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hpc.bench.wandb_server import Server
from hpc.run.directory import StageDirectory
from hpc.run.receipt import read_receipt
from hpc.tracking import dashboard, mirror
from hpc.tracking.rows import flatten, with_derived
from tests.conftest import Launch
from tests.tracking.conftest import at
from tests.tracking.test_sync import done_chain
from tests.tracking.trainer import row


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished chain."""
    done_chain(tmp_path / "run")
    return tmp_path / "run"


def panels(spec: dict[str, Any]) -> list[dict[str, Any]]:
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel["config"] for section in sections for panel in section["panels"]]


def test_the_specification_is_printed_without_a_server(run: Path, launch: Launch) -> None:
    result = launch("dashboard", run, "--json")
    assert result.returncode == 0, result.stderr
    spec = json.loads(result.stdout)
    assert (spec["project"], spec["displayName"]) == ("p", "GreenMoE chain")
    runs = spec["spec"]["section"]["runSets"][0]
    assert [(f["key"]["name"], f["op"], f["value"]) for f in runs["filters"]["filters"]] == [("group", "=", "chain")]
    assert [key["name"] for key in runs["grouping"]] == ["jobType", "displayName"]
    shown = {panel["chartTitle"]: panel for panel in panels(spec)}
    assert shown["Loss against tokens"]["xAxis"] == "tokens"
    assert shown["Loss against energy"]["xAxis"] == "energy_kwh"
    assert shown["Watts per node"]["metricRegex"] == "^node_power_w/"


def test_every_panel_shows_something_that_is_logged(run: Path) -> None:
    rare = {"heldout_loss": 1, "grad_norm": 1, "mfu": 1, "rank_step_p99_over_median": 1, "router_dropped": 0,
            "node_energy_j": {"n1": 1}, "router_max_over_mean_by_layer": [1, 1], "replayed": 1, "lr": 1}  # fmt: skip
    logged = flatten(with_derived({**row(1, 1), **rare}))
    directory = StageDirectory(run / "stages" / "pretrain")
    receipt = read_receipt(directory)
    assert receipt is not None
    final = flatten(mirror.final_figures(directory, receipt)) | {"energy_kwh": 1, "goodput": 1}
    for panel in panels(dashboard.specification(run)):
        if "metricRegex" in panel:
            assert any(re.search(panel["metricRegex"], name) for name in logged), panel["chartTitle"]
        for name in panel["metrics"]:
            known = final if name.startswith("summary_metrics.") else logged
            assert name.removeprefix("summary_metrics.") in known, f"{panel['chartTitle']}: {name}"
        assert panel.get("xAxis", "_timestamp") in logged, panel["chartTitle"]


def test_saving_twice_replaces_the_same_view(
    run: Path, server: Server, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(server, monkeypatch)
    for _ in range(2):
        result = launch("dashboard", run)
        assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{server.url}/team/p?nw=")
    assert [(view["displayName"], view["entityName"], view.get("id")) for view in server.views] == [
        ("GreenMoE chain", "team", None), ("GreenMoE chain", "team", "view-1"),
    ]  # fmt: skip
    assert server.views[0]["name"] == server.views[1]["name"]
    server.mood = "drop"
    result = launch("dashboard", run)
    assert (result.returncode, result.stderr.count("\n")) == (13, 1)
