"""The sampler as a process, the ledger over its files, and the facility around them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.config import Facility, PowerModel
from hpc.energy.footprint import footprint
from hpc.energy.ledger import power_series, stage_ledger
from hpc.energy.meter import EnergyMeter, Power, newest_power
from hpc.energy.sampler import start_sampler, stop_sampler

MODEL = PowerModel(cpu_idle_w_per_core=1, cpu_busy_w_per_core=4, dram_w_per_gib=0.5, source="made up for a test")


def rows(attempt: int, joules: list[float], ended: bool = True) -> list[dict[str, object]]:
    start = {
        "event": "start",
        "attempt": attempt,
        "time": 100.0 * attempt,
        "counters": [{"provenance": "measured: a test"}],
    }
    samples = [
        {"event": "sample", "attempt": attempt, "time": 100.0 * attempt + second, "energy_j": {"meter": value},
         "power_w": {"meter": 10.0}, "total_energy_j": value, "total_power_w": 10.0}
        for second, value in enumerate(joules)
    ]  # fmt: skip
    if ended:
        samples[-1]["event"] = "end"
    return [start, *samples]


def write(path: Path, *groups: list[dict[str, object]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for group in groups for row in group) + tail)


def test_all_attempts_on_all_nodes_count_also_those_that_died(tmp_path: Path) -> None:
    write(tmp_path / "energy-a.jsonl", rows(1, [0, 10, 20], ended=False), rows(2, [0, 5]))
    write(tmp_path / "energy-b.jsonl", rows(2, [0, 7]), tail='{"event": "sam')
    ledger = stage_ledger(tmp_path)
    assert ledger.energy_j == 20 + 5 + 7
    assert ledger.node_s == 2 + 1 + 1
    assert ledger.provenance == ("measured: a test",)
    assert [(part.host, part.attempt, part.complete) for part in ledger.nodes] == [
        ("a", 1, False),
        ("a", 2, True),
        ("b", 2, True),
    ]
    assert len(power_series(tmp_path)) == 7


def test_nothing_sampled_is_none_and_not_zero(tmp_path: Path) -> None:
    assert stage_ledger(tmp_path).energy_j is None
    assert newest_power(tmp_path, 1) is None


def test_the_meter_adds_what_earlier_attempts_drew(tmp_path: Path) -> None:
    write(tmp_path / "energy-a.jsonl", rows(1, [0, 10, 20], ended=False), rows(2, [0, 5], ended=False))
    reading = EnergyMeter(tmp_path, attempt=2).read()
    assert (reading.energy_j, reading.power_w_by_host) == (25, {"a": 10.0})
    assert newest_power(tmp_path, 2) == Power(10.0, is_estimated=False)


def test_the_sampler_outlives_a_killed_process_and_writes_its_end(tmp_path: Path) -> None:
    watched = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    sampler = start_sampler(tmp_path, "n1", watched.pid, 1, MODEL.model_dump_json())
    time.sleep(1.2)
    watched.send_signal(signal.SIGKILL)  # and nobody collects it: a zombie counts as gone
    try:
        sampler.wait(timeout=5)
    finally:
        watched.wait()
    path = next(tmp_path.glob("energy-*.jsonl"))
    events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert events[0] == "start"
    assert events[-1] == "end"
    ledger = stage_ledger(tmp_path)
    assert ledger.energy_j is not None
    assert ledger.energy_j > 0
    assert ledger.nodes[0].complete
    assert any(source.startswith(("estimated:", "measured:")) for source in ledger.provenance)


def test_the_sampler_leaves_the_process_group_of_its_stage(tmp_path: Path) -> None:
    sampler = start_sampler(tmp_path, "n1", os.getpid(), 1, MODEL.model_dump_json())
    try:
        assert os.getpgid(sampler.pid) != os.getpgid(os.getpid())
    finally:
        stop_sampler(sampler)


def test_archer2s_worked_example_comes_out_exactly() -> None:
    """64 nodes for 870 s, 7.740 kWh: ARCHER2's published worked example of a job's emissions."""
    facility = Facility(other_it_fraction=0.15, pue=1.10, carbon_g_per_kwh=7, embodied_g_per_node_hour=14)
    result = footprint(7.740 * 3.6e6, 64 * 870 / 3600, facility)
    assert result.other_it_kwh == pytest.approx(1.161, abs=5e-4)
    assert result.plant_kwh == pytest.approx(0.890, abs=5e-4)
    assert result.total_kwh == pytest.approx(9.791, abs=5e-4)
    assert result.carbon_kg == pytest.approx(0.069, abs=5e-4)
    assert result.embodied_kg == pytest.approx(0.217, abs=5e-4)


def test_what_the_site_does_not_state_is_none() -> None:
    result = footprint(3.6e6, 1.0, Facility())
    assert result.it_kwh == 1.0
    assert (result.total_kwh, result.water_l, result.carbon_kg, result.embodied_kg) == (None, None, None, None)
