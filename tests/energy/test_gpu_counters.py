"""GPUs at the Python interface of their libraries: what may be added, and what is said (the C interface:
test_vendor_libraries.py)."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpc.bench.fake_node import acpi_meter, rapl, topology
from hpc.energy.counters import amd_smi, discover
from tests.energy.test_counters import MODEL, names


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library, whatever this machine has."""
    monkeypatch.setitem(sys.modules, "pynvml", None)


class NvmlModule:
    """pynvml with the calls that we make."""

    class NVMLError(Exception):
        value = 3

    NVML_ERROR_NOT_SUPPORTED = 3

    def __init__(self, *models: str, buses: tuple[str, ...] = (), lacking: tuple[int, ...] = ()) -> None:
        self.models, self.lacking = models, lacking
        self.buses = buses or tuple(f"0000000{n}:01:00.0" for n in range(len(models)))
        self.joules = [1000.0] * len(models)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def unsupported(*_: Any) -> Any:
            raise self.NVMLError(f"{name}: not supported")

        return unsupported

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int:
        return len(self.models)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.models[handle]

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return SimpleNamespace(busId=self.buses[handle])

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if handle in self.lacking:
            raise self.NVMLError("not supported")
        return int(self.joules[handle] * 1000)


def serve_nvml(monkeypatch: pytest.MonkeyPatch, library: NvmlModule) -> NvmlModule:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return library


def grace_meters(root: Path, sockets: int) -> None:
    for socket in range(sockets):
        for place, rail in enumerate(("Module", "Grace", "CPU", "SysIO")):
            acpi_meter(root, 4 * socket + place, f"{rail} Power Socket {socket}", 400_000_000)


def test_on_gh200_nvml_counts_the_whole_module_and_no_grace_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPU 0 hangs on socket 1: the kernel's map counts, not the order."""
    serve_nvml(monkeypatch, NvmlModule("NVIDIA GH200 120GB", "NVIDIA GH200 120GB"))
    topology(tmp_path, [0, 0, 1, 1], {"0000:01:00.0": 2, "0001:01:00.0": 0})
    grace_meters(tmp_path, 2)
    found = discover(MODEL, tmp_path)
    assert [(counter.name, counter.scope) for counter in found.counters] == [("gpu0", "module"), ("gpu1", "module")]
    assert "Grace Power Socket 1 is not added: gpu0 covers it" in found.notes
    assert "the whole module, its Grace included" in found.counters[0].provenance


def test_modules_whose_gpus_the_job_does_not_see_are_measured_by_their_own_meters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_nvml(monkeypatch, NvmlModule("NVIDIA GH200 120GB"))
    topology(tmp_path, [0, 1, 2, 3], {"0000:01:00.0": 2})
    grace_meters(tmp_path, 4)
    assert sorted(names(discover(MODEL, tmp_path))) == [
        "Module Power Socket 0", "Module Power Socket 1", "Module Power Socket 3", "gpu0",
    ]  # fmt: skip


def test_where_the_place_of_a_gh200_is_not_known_the_modules_meters_are_taken_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_nvml(monkeypatch, NvmlModule("NVIDIA GH200 120GB"))
    grace_meters(tmp_path, 4)
    assert sorted(names(discover(MODEL, tmp_path))) == [f"Module Power Socket {socket}" for socket in range(4)]


def test_gpus_in_a_server_are_added_to_its_packages_whatever_cuda_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    library = serve_nvml(monkeypatch, NvmlModule("NVIDIA A100", "NVIDIA A100", "NVIDIA A100", lacking=(2,)))
    for label, name in (("0", "package-0"), ("0:0", "dram")):
        rapl(tmp_path, label, name, 5)
    found = discover(MODEL, tmp_path)
    assert names(found) == ["intel-rapl:0 package-0", "intel-rapl:0:0 dram", "gpu0", "gpu1"]
    assert found.unmeasured == ["gpu2", "network, storage, fans and power supply"]
    library.joules[1] += 70
    readings = [counter.read() for counter in found.counters]
    assert [r.energy_j for r in readings] == [0, 0, 0, 70], readings


def test_processors_that_nobody_measures_are_estimated_beside_measured_gpus_and_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_nvml(monkeypatch, NvmlModule("NVIDIA A100"))
    found = discover(MODEL, tmp_path)
    assert [(counter.name, counter.provenance) for counter in found.counters] == [
        ("cpu+dram estimate", "estimated: CPU utilisation and a power model (made up for a test)"),
        ("gpu0", "measured: NVML total energy counter"),
    ]


class AmdModule:
    """amdsmi with the calls that we make: one (model, accumulator) a device."""

    def __init__(self, *devices: tuple[str, object]) -> None:
        self.devices = [*devices]

    def amdsmi_init(self) -> None: ...
    def amdsmi_get_processor_handles(self) -> list[int]:
        return [*range(len(self.devices))]

    def amdsmi_get_gpu_asic_info(self, handle: int) -> dict[str, str]:
        return {"market_name": self.devices[handle][0]}

    def amdsmi_get_gpu_device_bdf(self, handle: int) -> str:
        return f"0000:{handle:02x}:00.0"

    def amdsmi_get_energy_count(self, handle: int) -> dict[str, object]:
        return {"energy_accumulator": self.devices[handle][1], "counter_resolution": 15.3, "timestamp": 1}


def amd(root: Path, monkeypatch: pytest.MonkeyPatch, *devices: tuple[str, object]) -> AmdModule:
    library = AmdModule(*devices)
    monkeypatch.setitem(sys.modules, "amdsmi", library)
    (root / amd_smi.DRIVER).mkdir(parents=True)
    return library


def test_amds_accumulator_times_its_resolution_is_microjoules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = amd(tmp_path, monkeypatch, ("AMD Instinct MI300X", 10**9))
    counter = discover(None, tmp_path).counters[0]
    library.devices[0] = ("AMD Instinct MI300X", 10**9 + 10**6)
    assert counter.read().energy_j == pytest.approx(15.3)
    library.devices[0] = ("AMD Instinct MI300X", "N/A")
    assert "it has no value" in counter.read().notes[0]


@pytest.mark.parametrize("second", [0, "N/A", 10**9])
def test_the_second_die_of_an_mi250x_is_in_the_counter_of_the_first(
    second: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = [("AMD Instinct MI250X", 10**9), ("AMD Instinct MI250X", second)]
    amd(tmp_path, monkeypatch, *board, ("AMD Instinct MI250X", 7 * 10**9), ("AMD Instinct MI250X", second))
    if second == 10**9:
        sys.modules["amdsmi"].devices[3] = ("AMD Instinct MI250X", 7 * 10**9)
    found = discover(None, tmp_path)
    assert names(found) == ["amd gpu0", "amd gpu2"]
    assert "both dies of the board" in found.counters[0].provenance
    assert "amd gpu1 (AMD Instinct MI250X): the counter of amd gpu0 counts it" in found.notes
    assert not any("gpu" in name for name in found.unmeasured)


def test_a_second_die_alone_and_an_mi100_are_not_measured_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    amd(tmp_path, monkeypatch, ("AMD Instinct MI250X", 0), ("AMD Instinct MI100", 10**9))
    found = discover(None, tmp_path)
    assert found.counters == []
    assert found.unmeasured[2:4] == ["amd gpu0", "amd gpu1"]
    assert "the other die, which is not shown here" in found.notes[0]
    assert "its energy counter is wrong" in found.notes[1]


def test_an_mi300a_is_processor_and_memory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amd(tmp_path, monkeypatch, *[("AMD Instinct MI300A", 10**9 + n) for n in range(4)])
    for socket in range(4):
        rapl(tmp_path, f"{socket}", f"package-{socket}", 10**9 * (socket + 1))
    found = discover(MODEL, tmp_path)
    assert names(found) == [f"amd gpu{number}" for number in range(4)]
    assert found.unmeasured == ["network, storage, fans and power supply"]


def test_an_amd_driver_without_its_python_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / amd_smi.DRIVER).mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    found = discover(None, tmp_path)
    assert "install the amdsmi package of this ROCm" in found.notes[0]
    assert "AMD GPUs" in found.unmeasured
