"""Counters on fake sysfs trees: wraps, restarts, torn reads, what may be added and what may not."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.config import PowerModel
from hpc.energy.counters import discover, nvml
from hpc.energy.counters.base import Accumulator
from hpc.energy.counters.estimate import CpuEstimate
from hpc.energy.counters.pm_counters import PmCounters

MODEL = PowerModel(cpu_idle_w_per_core=1, cpu_busy_w_per_core=4, dram_w_per_gib=0.5, source="made up for a test")


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "find", lambda: ([], []))


def zone(root: Path, label: str, name: str, microjoules: int, wrap: int = 10**9) -> Path:
    folder = root / "sys/class/powercap" / label
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(name + "\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{wrap}\n")
    return folder


def cray(root: Path, energy: int, power: int = 300, freshness: int = 1) -> Path:
    folder = root / "sys/cray/pm_counters"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("energy", f"{energy} J 17 us"), ("power", f"{power} W 17 us"), ("freshness", f"{freshness}")):
        (folder / name).write_text(text + "\n")
    return folder


def test_rapl_takes_packages_and_memory_but_nothing_that_overlaps_them(tmp_path: Path) -> None:
    for label, name in (("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("0:2", "uncore"), ("1", "psys")):
        zone(tmp_path, f"intel-rapl:{label}", name, 5)
    found = discover(MODEL, tmp_path)
    assert [(counter.scope, counter.provenance) for counter in found.counters] == [
        ("package", "measured: RAPL powercap"),
        ("dram", "measured: RAPL powercap"),
    ]


def test_rapl_counts_across_a_wrap(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 900_000_000)
    counter = discover(MODEL, tmp_path).counters[0]
    (folder / "energy_uj").write_text("400000000")
    # 100 J to the end of the range and 400 J after it, but 500 J in a millisecond is no wrap: half a megawatt.
    assert counter.read().energy_j == pytest.approx(400.0)


def test_a_plausible_wrap_adds_the_rest_of_the_range() -> None:
    accumulator = Accumulator(wrap_j=1000.0)
    accumulator.add(900.0, now=0.0)
    accumulator.add(100.0, now=1.0)
    assert accumulator.total_j == pytest.approx(200.0)
    assert accumulator.power_w == pytest.approx(200.0)


def test_a_counter_that_restarts_counts_from_zero_again() -> None:
    accumulator = Accumulator()
    for second, value in enumerate([1_000_000.0, 1_000_250.0, 30.0, 80.0]):
        accumulator.add(value, now=float(second))
    assert accumulator.total_j == pytest.approx(250 + 30 + 50)


@given(
    steps=st.lists(st.tuples(st.floats(0, 1e6), st.floats(0.01, 1e4)), min_size=1), wrap=st.none() | st.floats(1, 1e6)
)
def test_no_sequence_of_readings_gives_negative_energy(steps: list[tuple[float, float]], wrap: float | None) -> None:
    accumulator, now, before = Accumulator(wrap_j=wrap), 0.0, 0.0
    for value, seconds in steps:
        now += seconds
        accumulator.add(value, now=now)
        assert accumulator.total_j >= before
        before = accumulator.total_j


def test_a_permission_denied_is_said_and_the_estimate_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    read_text = Path.read_text

    def denied(path: Path, *arguments: object, **options: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", denied)
    found = discover(MODEL, tmp_path)
    assert found.notes == ["RAPL package-0: permission denied (readable by root only since Linux 5.10)"]
    assert [counter.scope for counter in found.counters] == ["cpu+dram"]
    assert found.counters[0].provenance.startswith("estimated: CPU utilisation")


def test_a_node_meter_covers_everything_else(tmp_path: Path) -> None:
    cray(tmp_path, 1000)
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    assert [counter.scope for counter in discover(MODEL, tmp_path).counters] == ["node"]


def test_pm_counters_give_energy_since_the_start_and_the_meters_own_power(tmp_path: Path) -> None:
    folder = cray(tmp_path, 1000)
    counter = PmCounters(folder)
    cray(tmp_path, 1450, power=321, freshness=2)
    reading = counter.read()
    assert (reading.energy_j, reading.power_w) == (450, 321)


def test_pm_counters_that_change_while_they_are_read_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cray(tmp_path, 1000)
    counter = PmCounters(folder)
    freshness = iter(["2", "3", "3", "3"])
    read_text = Path.read_text

    def torn(path: Path, *arguments: object, **options: object) -> str:
        if path.name == "freshness":
            number = next(freshness)
            cray(tmp_path, 1100 if number == "2" else 1200, freshness=int(number))
            return number
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", torn)
    assert counter.read().energy_j == 200


def test_the_estimate_lies_between_idle_and_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda: 2)
    monkeypatch.setattr("psutil.cpu_percent", lambda: 50.0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 8 * 2**30}))
    assert CpuEstimate(MODEL).read().power_w == pytest.approx(2 * 2.5 + 8 * 0.5)


def test_without_a_power_model_nothing_is_estimated(tmp_path: Path) -> None:
    assert discover(None, tmp_path).counters == []
