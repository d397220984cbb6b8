"""Each source on fake trees and libraries: what may be added, what may not, and what is said about it."""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc.bench.fake_node import acpi_meter, cray, rapl, topology, write
from hpc.config import PowerModel
from hpc.energy.counters import Discovery, base, discover, nvml
from hpc.energy.counters.base import Accumulator
from hpc.energy.counters.estimate import CpuEstimate
from hpc.energy.counters.pm_counters import PmCounters
from hpc.energy.counters.slurm import consumed_energy_j

MODEL = PowerModel(cpu_idle_w_per_core=1, cpu_busy_w_per_core=4, dram_w_per_gib=0.5, source="made up for a test")


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library, whatever this machine has."""
    monkeypatch.setitem(sys.modules, "pynvml", None)


def names(found: Discovery) -> list[str]:
    return [counter.name for counter in found.counters]


# RAPL


def test_rapl_takes_packages_and_memory_but_nothing_that_overlaps_them(tmp_path: Path) -> None:
    for label, name in (("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("0:2", "uncore"), ("1", "psys")):
        rapl(tmp_path, label, name, 5)
    rapl(tmp_path, "-mmio:0".removeprefix(":"), "package-0", 5).rename(
        tmp_path / "sys/class/powercap/intel-rapl-mmio:0"
    )
    found = discover(MODEL, tmp_path)
    assert names(found) == ["intel-rapl:0 package-0", "intel-rapl:0:1 dram"]
    assert {counter.provenance for counter in found.counters} == {"measured: RAPL powercap"}
    assert found.unmeasured == ["network, storage, fans and power supply"]


def test_rapl_zones_of_two_sockets_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for socket in (10, 2):
        rapl(tmp_path, f"{socket}", f"package-{socket}", socket * 10**9)
    assert names(discover(None, tmp_path)) == ["intel-rapl:2 package-2", "intel-rapl:10 package-10"]


def test_dies_that_mirror_one_counter_count_once_and_dies_of_their_own_all(tmp_path: Path) -> None:
    rapl(tmp_path, "0", "package-0-die-0", 71_234_567_890)
    rapl(tmp_path, "1", "package-0-die-1", 71_234_567_890)
    rapl(tmp_path, "2", "package-1-die-0", 55_000_000_000)
    rapl(tmp_path, "3", "package-1-die-1", 55_000_100_000)
    found = discover(None, tmp_path)
    assert names(found) == [
        "intel-rapl:0 package-0-die-0", "intel-rapl:2 package-1-die-0", "intel-rapl:3 package-1-die-1",
    ]  # fmt: skip
    assert "RAPL package-0-die-1 mirrors intel-rapl:0 package-0-die-0: counted once" in found.notes


def test_memory_that_rapl_does_not_measure_is_estimated_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AMD's RAPL has no memory zone."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=8 * 2**30))
    rapl(tmp_path, "0", "package-0", 5)
    found = discover(MODEL, tmp_path)
    assert names(found) == ["dram estimate", "intel-rapl:0 package-0"]
    assert found.counters[0].provenance == "estimated: installed memory and a power model (made up for a test)"
    assert found.counters[0].read().power_w == 8 * 0.5
    assert discover(None, tmp_path).unmeasured == ["dram", "network, storage, fans and power supply"]


def test_a_socket_whose_package_cannot_be_read_is_estimated_by_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda: 8)
    monkeypatch.setattr("psutil.cpu_percent", lambda: 50.0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=8 * 2**30))
    topology(tmp_path, [36, 36, 36, 3180])  # package ids of the kernel need not be 0, 1
    rapl(tmp_path, "0", "package-0", 5)
    rapl(tmp_path, "0:0", "dram", 5)
    write(rapl(tmp_path, "1", "package-1", 5) / "energy_uj", "no number")
    found = discover(MODEL, tmp_path)
    assert "estimated: CPU utilisation for 50% of the cores and 50% of the installed memory" in (
        found.counters[0].provenance
    )
    assert found.counters[0].read().power_w == pytest.approx(4 * 2.5 + 4 * 0.5)


@contextmanager
def somebody() -> Iterator[Path]:
    """A folder, seen by a user who is not root: file modes then mean something."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        user = os.geteuid()
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


def test_a_permission_denied_is_said_with_a_way_out_and_the_estimate_takes_over() -> None:
    with somebody() as root:
        (rapl(root, "0", "package-0", 5) / "energy_uj").chmod(0o400 if os.geteuid() == 0 else 0)
        if os.geteuid() == 0:
            os.seteuid(65534)
        found = discover(MODEL, root)
    assert found.notes == [
        "RAPL package-0: permission denied (readable by root only since Linux 5.10): ask the site to let your job read "
        "/sys/class/powercap/*/energy_uj, or for Slurm's energy accounting"
    ]
    assert [counter.scope for counter in found.counters] == ["cpu+dram"]
    assert found.counters[0].provenance.startswith("estimated: CPU utilisation")


def test_a_permission_that_is_taken_away_later_stops_nothing() -> None:
    with somebody() as root:
        file = rapl(root, "0", "package-0", 1_000_000) / "energy_uj"
        counter = discover(None, root).counters[0]
        write(file, 3_000_000)
        assert counter.read().energy_j == 2
        file.chmod(0o400 if os.geteuid() == 0 else 0)
        if os.geteuid() == 0:
            os.seteuid(65534)
        readings = [counter.read(), counter.read()]
    assert [reading.energy_j for reading in readings] == [2, 2]
    assert "cannot be read: PermissionError" in readings[0].notes[0]
    assert readings[1].notes == (), "once is enough"


# pm_counters


def test_a_node_meter_covers_everything_else(tmp_path: Path) -> None:
    cray(tmp_path, 1000)
    rapl(tmp_path, "0", "package-0", 5)
    found = discover(MODEL, tmp_path)
    assert [counter.scope for counter in found.counters] == ["node"]
    assert found.unmeasured == []


def test_pm_counters_give_energy_since_the_start_and_the_meters_own_power(tmp_path: Path) -> None:
    counter = PmCounters(cray(tmp_path, 1000))
    cray(tmp_path, 1450, power_w=321, freshness=2)
    reading = counter.read()
    assert (reading.energy_j, reading.power_w) == (450, 321)


def test_what_pm_counters_tell_of_parts_is_detail_and_never_in_the_sum(tmp_path: Path) -> None:
    counter = PmCounters(cray(tmp_path, 1000, inside={"cpu": 10, "accel0": 20}))
    cray(tmp_path, 1450, freshness=2, inside={"cpu": 110, "accel0": 270})
    reading = counter.read()
    assert reading.energy_j == 450
    assert reading.detail_j == {"accel0_energy": 250, "cpu_energy": 100}


def test_a_part_that_shows_no_number_costs_its_own_detail_only(tmp_path: Path) -> None:
    folder = cray(tmp_path, 1000, inside={"cpu": 10, "accel0": 20})
    counter = PmCounters(folder)
    cray(tmp_path, 1450, freshness=2, inside={"cpu": 110, "accel0": 270})
    write(folder / "accel0_energy", "N/A")
    (folder / "cpu_energy").unlink()
    (folder / "power").unlink()
    reading = counter.read()
    assert (reading.energy_j, reading.stale_s, reading.notes) == (450, 0, ())
    assert reading.detail_j == {"accel0_energy": 0, "cpu_energy": 0}
    assert reading.power_w != 300, "not the instrument's last figure but the mean since the reading before"


def test_pm_counters_of_different_refreshes_are_never_taken_together(tmp_path: Path) -> None:
    """All files change at once, many times a second, while a reader goes from one to the next."""
    folder, num_refreshes = tmp_path / "sys/cray/pm_counters", 60
    folder.parent.mkdir(parents=True)
    for number in range(num_refreshes):
        made = cray(tmp_path / f"{number}", number, power_w=number, freshness=number, inside={"cpu": number})
        (tmp_path / f"next-{number}").symlink_to(made)
    (tmp_path / "next-0").rename(folder)
    counter = PmCounters(folder)

    def refresh() -> None:
        for number in range(1, num_refreshes):
            (tmp_path / f"next-{number}").rename(folder)
            time.sleep(0.0003)

    thread = threading.Thread(target=refresh)
    thread.start()
    is_last = False
    while not is_last:
        is_last = not thread.is_alive()
        reading = counter.read()
        assert reading.energy_j == reading.detail_j["cpu_energy"] == reading.power_w
    assert reading.energy_j == num_refreshes - 1


def test_a_controller_that_starts_again_is_known_by_its_epoch_even_when_the_energy_rose(tmp_path: Path) -> None:
    counter = PmCounters(cray(tmp_path, 100, startup=7))
    cray(tmp_path, 150, startup=8, freshness=2)
    reading = counter.read()
    assert reading.energy_j == 150, "150 J since the controller started, not 50 J since the reading before"
    assert "pm_counters restarted (its epoch changed)" in reading.notes[0]
    assert counter.epoch == "8"


def test_a_power_cap_and_a_controller_that_stands_still_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    counter = PmCounters(cray(tmp_path, 100, generation=1))
    cray(tmp_path, 100, generation=2)
    assert counter.read().notes == ("pm_counters generation changed: a power cap was set or lifted",)
    clock[0] += 11
    assert counter.read().notes == ("pm_counters have not been refreshed for 10 s: the node draws more than they show",)
    assert counter.read().notes == ()


def test_unreadable_pm_counters_are_no_counter(tmp_path: Path) -> None:
    write(cray(tmp_path, 100) / "energy", "")
    found = discover(None, tmp_path)
    assert found.counters == []
    assert "is there but cannot be read" in found.notes[0]


# Grace and ACPI


def test_a_grace_module_contains_its_grace_and_a_grace_its_cpu(tmp_path: Path) -> None:
    labels = [f"{rail} Power Socket {socket}" for rail in ("CPU", "Grace", "SysIO", "Module") for socket in (0, 1)]
    for number, label in enumerate(labels):
        acpi_meter(tmp_path, number, label, 100_000_000 + number)
    assert names(discover(None, tmp_path)) == ["Module Power Socket 0", "Module Power Socket 1"]
    for number in (6, 7):
        (tmp_path / f"sys/class/hwmon/hwmon{number}/device/power1_average").unlink()
    assert names(discover(None, tmp_path)) == ["Grace Power Socket 0", "Grace Power Socket 1"]
    for number in (2, 3):
        (tmp_path / f"sys/class/hwmon/hwmon{number}/device/power1_average").unlink()
    found = discover(MODEL, tmp_path)
    assert sorted(names(found)) == [
        "CPU Power Socket 0", "CPU Power Socket 1", "SysIO Power Socket 0", "SysIO Power Socket 1", "dram estimate",
    ]  # fmt: skip


def test_power_is_integrated_by_the_mean_and_a_long_gap_is_not_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    device = acpi_meter(tmp_path, 0, "Grace Power Socket 0", 100_000_000)
    counter = discover(None, tmp_path).counters[0]
    assert counter.provenance == (
        "measured: ACPI power meter 'Grace Power Socket 0', integrated from samples (each a mean over 50 ms)"
    )
    clock[0] += 2
    write(device / "power1_average", 200_000_000)
    assert counter.read() == base.Reading(energy_j=300.0, power_w=200.0)
    clock[0] += 1200
    reading = counter.read()
    assert reading.energy_j == 300.0
    assert reading.unsure_j == 1200 * 3000
    assert "not read for 1200 s: nothing counted" in reading.notes[0]


def test_a_servers_own_meter_is_the_node_and_one_that_shows_nothing_is_refused(tmp_path: Path) -> None:
    device = acpi_meter(tmp_path, 0, "", 500_000_000)
    rapl(tmp_path, "0", "package-0", 5)
    found = discover(MODEL, tmp_path)
    assert names(found) == ["hwmon0 power_meter"]
    assert "intel-rapl:0 package-0 is not added: hwmon0 power_meter covers it" in found.notes
    write(device / "power1_average", 0)
    assert names(discover(None, tmp_path)) == ["intel-rapl:0 package-0"]


# Steps


def added(accumulator: Accumulator, *readings: tuple[float, float]) -> list[str]:
    return [note for value, when in readings if (note := accumulator.add(value, when, when))]


def test_a_plausible_wrap_adds_the_rest_of_the_range() -> None:
    accumulator = Accumulator(max_w=3000, wrap_j=1000.0)
    assert added(accumulator, (900.0, 0.0), (100.0, 0.1)) == []
    assert (accumulator.total_j, accumulator.power_w) == (200.0, 2000.0)


def test_a_wrap_that_no_hardware_could_draw_is_a_restart() -> None:
    """Half a kilojoule in no time: 100 J to the end of the range and 400 J after it would be 5 kW at least."""
    accumulator = Accumulator(max_w=2000, wrap_j=1000.0)
    notes = added(accumulator, (900.0, 0.0), (400.0, 0.01))
    assert accumulator.total_j == 400.0
    assert accumulator.unsure_j == pytest.approx(2000 * 0.21 - 400)
    assert notes == ["fell from 900 J to 400 J, taken for a restart: up to 20 J before it were not seen"]


def test_twenty_minutes_without_a_reading_may_hide_wraps_and_their_energy_is_bounded() -> None:
    """262 kJ at up to 3 kW wrap every 87 s. Seen: 1,000 J; up to 13 whole ranges may be missing."""
    accumulator = Accumulator(max_w=3000, wrap_j=262_143.0)
    notes = added(accumulator, (5000.0, 0.0), (6000.0, 1200.0))
    assert accumulator.total_j == 1000.0
    assert accumulator.unsure_j == 13 * 262_143.0
    assert notes == ["was not read for so long that up to 13 wraps of 262143 J may be missing"]


def test_a_counter_that_restarts_counts_from_zero_again() -> None:
    accumulator = Accumulator(max_w=50_000)
    added(accumulator, *((value, float(n)) for n, value in enumerate([1_000_000.0, 1_000_250.0, 30.0, 80.0])))
    assert accumulator.total_j == 250 + 30 + 50


def test_a_wild_value_is_no_energy_in_either_direction() -> None:
    accumulator = Accumulator(max_w=5000)
    notes = added(accumulator, (1e6, 0.0), (1.8e19, 1.0), (1_000_400.0, 2.0), (1_000_700.0, 3.0))
    assert accumulator.total_j == 300
    assert accumulator.unsure_j == 2 * 5000 * 1.2
    assert len(notes) == 2


def test_a_process_suspended_between_the_clock_and_the_counter_loses_nothing() -> None:
    """The value of the second reading is twenty minutes younger than its time."""
    accumulator = Accumulator(max_w=5000)
    assert accumulator.add(0.0, 0.0, 0.0) == ""
    assert accumulator.add(360_000.0, 1.0, 1201.0) == ""
    assert accumulator.add(360_300.0, 1202.0, 1202.0) == ""
    assert accumulator.total_j == 360_300.0


# Estimate, Slurm


def test_the_estimate_lies_between_idle_and_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda: 2)
    monkeypatch.setattr("psutil.cpu_percent", lambda: 50.0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=8 * 2**30))
    assert CpuEstimate(MODEL).read().power_w == pytest.approx(2 * 2.5 + 8 * 0.5)


def test_an_estimate_that_the_kernel_gives_no_figures_for_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> float:
        raise OSError("no /proc/stat")

    estimate = CpuEstimate(MODEL)
    before = estimate.read().energy_j
    monkeypatch.setattr("psutil.cpu_percent", fail)
    reading = estimate.read()
    assert reading.energy_j == before
    assert reading.notes == ("cpu+dram estimate cannot be read: OSError: no /proc/stat",)


def test_without_a_power_model_nothing_is_estimated(tmp_path: Path) -> None:
    found = discover(None, tmp_path)
    assert found.counters == []
    assert found.unmeasured[:2] == ["cpu", "dram"]


@pytest.mark.parametrize(
    ("raw", "joules"),
    [("123456", 123456.0), (" 7\n", 7.0), ("", None), ("0", None), ("18446744073709551614", None), ("1.2K", None),
     ("-5", None), ("nan", None), ("inf", None)],
)  # fmt: skip
def test_slurms_figure_is_joules_or_nothing(raw: str, joules: float | None) -> None:
    assert consumed_energy_j(raw) == joules


def test_nvml_that_is_absent_is_no_error(tmp_path: Path) -> None:
    assert nvml.find(tmp_path) == ([], [], [])
