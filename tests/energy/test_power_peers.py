"""Our counters beside zeus 0.16.0 (July 2026) and codecarbon 3.3.2 (October 2026): the same where these are right.

Both are alive. They are oracles here and not the source of our numbers, because (each row is shown below on the same
fake node, and fails when a release of theirs mends it):

| Where | zeus | codecarbon |
|---|---|---|
| RAPL wraps | up to 1 s after it, energy falls by the whole range | right |
| RAPL falls without a wrap | a wrap | a wrap: 65 kJ from nothing |
| `psys` beside the packages | counted as one more CPU | right |
| dies that mirror one counter | counted each | right |
| RAPL memory | right | left out (a zone inside a package); memory is estimated |
| a counter that cannot be read | an exception | the interval is lost, and not said |
| NVML after a driver reload | an exception, for ever | for ever on the last power, or 0 |
| a GPU's UUID in CUDA_VISIBLE_DEVICES | an exception | (not used) |
| GH200 | says that NVML covers the module, and adds the Grace | adds the CPU |
| pm_counters, ACPI meters of a server | not read | not read |

Not shown, read in their source: codecarbon multiplies PUE into the energy of each component and then water on top.

They run in processes, or an environment, of their own (conftest.py says how).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc.bench.fake_node import FakeGpu, FakeNvml, write
from tests.energy.conftest import Reader, reader

RANGE_J = 65_536

ZEUS = """
import json, sys
import zeus.device.cpu.rapl as rapl
from zeus.device.gpu.nvidia import NVIDIAGPUs
def main():
    rapl.RAPL_DIR = sys.argv[1] + "/sys/class/powercap/intel-rapl"
    def tell(what): print(json.dumps(what), flush=True)
    try:
        cpus, gpus = rapl.RAPLCPUs().cpus, NVIDIAGPUs().gpus
    except Exception as error:
        return tell({"error": f"{type(error).__name__}: {error}"})
    def joules():
        try:
            seen = [cpu.get_total_energy_consumption() for cpu in cpus]
            return {"cpu": [m.cpu_mj / 1e3 for m in seen],
                    "dram": [m.dram_mj / 1e3 for m in seen if m.dram_mj is not None],
                    "gpu": [gpu.get_total_energy_consumption() / 1e3 for gpu in gpus]}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
    first = joules()
    tell(first)
    for _ in sys.stdin:
        now = joules()
        tell(now if "error" in now else {part: [a - b for a, b in zip(now[part], first[part])] for part in now})
if __name__ == "__main__":
    main()
"""

CODECARBON = """
import contextlib, json, logging, sys
logging.disable(logging.CRITICAL)
with contextlib.redirect_stdout(sys.stderr):  # amdsmi prints that it has no library
    from codecarbon.core.cpu import IntelRAPL
    from codecarbon.core.gpu import AllGPUDevices
    from codecarbon.core.units import Time
cpu = IntelRAPL(rapl_dir=sys.argv[1] + "/sys/class/powercap/intel-rapl", rapl_include_dram=True)
gpus = AllGPUDevices()
cpu.start(); gpus.start()
sums = {"cpu": [], "gpu": []}
def add(part, figures): sums[part] = [a + b for a, b in zip(sums[part] or [0] * len(figures), figures)]
def tell(what): print(json.dumps(what), flush=True)
tell({})
for _ in sys.stdin:
    details = cpu.get_cpu_details(Time.from_seconds(1.0))
    add("cpu", [v * 3.6e6 for k, v in details.items() if k.startswith("Processor Energy")])
    add("gpu", [row["delta_energy_consumption"].kWh * 3.6e6 for row in gpus.get_delta(Time.from_seconds(1.0))])
    tell(sums)
"""


class Node:
    """Two packages, one with memory, in the kernel's places: folders inside each other, and links to all of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._zones = root / "sys/devices/virtual/powercap/intel-rapl"
        self._class = root / "sys/class/powercap"
        self._class.mkdir(parents=True)
        (self._class / "intel-rapl").symlink_to(self._zones)
        self.joules: dict[str, int] = {}

    def zone(self, label: str, name: str, joules: int) -> None:
        parts = label.split(":")
        folder = self._zones.joinpath(*(f"intel-rapl:{':'.join(parts[: n + 1])}" for n in range(len(parts))))
        for file, text in (("name", name), ("max_energy_range_uj", RANGE_J * 10**6)):
            write(folder / file, text)
        (self._class / folder.name).symlink_to(folder)
        self.joules[label] = joules
        self.feed(label, 0)

    def feed(self, label: str, joules: int) -> None:
        self.joules[label] = (self.joules[label] + joules) % RANGE_J
        write((self._class / f"intel-rapl:{label}").resolve() / "energy_uj", self.joules[label] * 10**6)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    node = Node(tmp_path)
    for label, name, joules in (("0", "package-0", 60_000), ("0:0", "dram", 100), ("1", "package-1", 7_000)):
        node.zone(label, name, joules)
    return node


@pytest.fixture
def gpus(tmp_path: Path) -> FakeNvml:
    try:
        library = FakeNvml(tmp_path)
    except FileNotFoundError as error:
        pytest.skip(f"the fake libnvidia-ml.so.1 is compiled: {error}")
    library.show(*GPUS)
    return library


GPUS = [FakeGpu(energy_mj=5_000_000), FakeGpu(energy_mj=77_000, bus="00000000:02:00.0")]
Start = Callable[[str], Reader]


@pytest.fixture
def start(node: Node, gpus: FakeNvml, python_with: Callable[[str], str]) -> Iterator[Start]:
    """Start a reader: 'ours', 'zeus' or 'codecarbon'."""
    with ExitStack() as stack:

        def start(who: str) -> Reader:
            environment = {**gpus.environment, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")}
            if who == "ours":
                return stack.enter_context(reader(node.root, environment))
            code = {"zeus": ZEUS, "codecarbon": CODECARBON}[who]
            return stack.enter_context(reader(node.root, environment, python_with(who), code))

        yield start


def of_us(reading: dict[str, Any], kind: str) -> list[float]:
    """Our joules of 'package', 'dram' or 'gpu', in the order of their numbers."""
    return [value["energy_j"] for name, value in reading.items() if kind in name]


def test_all_three_agree_where_nothing_happens(start: Start, node: Node, gpus: FakeNvml) -> None:
    ours, zeus, codecarbon = start("ours"), start("zeus"), start("codecarbon")
    for label, joules in (("0", 120), ("0:0", 333), ("1", 240)):
        node.feed(label, joules)
    gpus.show(*(replace(gpu, energy_mj=gpu.energy_mj + 700_500) for gpu in GPUS))
    seen, theirs, others = ours.read(), zeus.read(), codecarbon.read()
    for packages in (of_us(seen, "package"), theirs["cpu"], others["cpu"]):
        assert packages == pytest.approx([120, 240])
    for memory in (of_us(seen, "dram"), theirs["dram"]):
        assert memory == pytest.approx([333])
    for accelerators in (of_us(seen, "gpu"), theirs["gpu"], others["gpu"]):
        assert accelerators == pytest.approx([700.5, 700.5])


def test_a_wrap_is_energy_for_us_and_codecarbon_and_at_first_negative_for_zeus(start: Start, node: Node) -> None:
    ours, zeus, codecarbon = start("ours"), start("zeus"), start("codecarbon")
    for _ in range(14):
        node.feed("0", 400)
        theirs, seen, others = zeus.read(), ours.read(), codecarbon.read()
    assert of_us(seen, "package")[0] == pytest.approx(5600)
    assert others["cpu"][0] == pytest.approx(5600)
    assert theirs["cpu"][0] == pytest.approx(5600 - RANGE_J)


def test_a_fall_that_is_no_wrap_makes_no_energy_for_us_and_a_whole_range_for_codecarbon(
    start: Start, node: Node
) -> None:
    ours, codecarbon = start("ours"), start("codecarbon")
    node.feed("1", 50 - 7_000)
    seen, others = ours.read(), codecarbon.read()
    assert of_us(seen, "package")[1] == 50
    assert "taken for a restart" in seen["intel-rapl:1 package-1"]["notes"][0]
    assert others["cpu"][1] == pytest.approx(RANGE_J - 6_950)


def test_psys_and_mirrored_dies_are_cpus_of_their_own_for_zeus(start: Start, node: Node) -> None:
    node.zone("2", "psys", 9_000)
    node.zone("3", "package-0-die-1", 60_000)
    ours, zeus, codecarbon = start("ours"), start("zeus"), start("codecarbon")
    for label, joules in (("0", 100), ("1", 100), ("2", 230), ("3", 100)):
        node.feed(label, joules)
    assert sum(of_us(ours.read(), "package")) == pytest.approx(200)
    assert sum(codecarbon.read()["cpu"]) == pytest.approx(200)
    assert sum(zeus.read()["cpu"]) == pytest.approx(530)


def test_memory_inside_a_package_is_left_out_by_codecarbon(start: Start, node: Node) -> None:
    codecarbon = start("codecarbon")
    node.feed("0:0", 500)
    assert sum(codecarbon.read()["cpu"]) == 0


def test_a_counter_that_cannot_be_read_once_costs_codecarbon_the_interval_and_zeus_its_life(
    start: Start, node: Node
) -> None:
    ours, zeus, codecarbon = start("ours"), start("zeus"), start("codecarbon")
    file = node.root / "sys/class/powercap/intel-rapl:0/energy_uj"
    node.feed("0", 100)
    file.rename(file.with_name("away"))
    assert ours.read()["intel-rapl:0 package-0"]["energy_j"] == 0
    codecarbon.read()
    assert "FileNotFoundError" in zeus.read()["error"]
    file.with_name("away").rename(file)
    node.feed("0", 100)
    assert of_us(ours.read(), "package")[0] == 200
    codecarbon.read()
    node.feed("0", 100)
    assert codecarbon.read()["cpu"][0] == pytest.approx(100)


def test_after_a_driver_reload_only_we_read_on(start: Start, gpus: FakeNvml) -> None:
    ours, zeus, codecarbon = start("ours"), start("zeus"), start("codecarbon")
    gpus.show(*(replace(gpu, energy_mj=40_000) for gpu in GPUS), life=2)
    ours.read()
    assert of_us(ours.read(), "gpu") == [40, 40]
    codecarbon.read()
    assert codecarbon.read()["gpu"] == [0, 0]
    assert "Uninitialized" in zeus.read()["error"]


def test_a_uuid_in_cuda_visible_devices_ends_zeus(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    assert [name for name, _ in start("ours").found["counters"] if "gpu" in name] == ["gpu0", "gpu1"]
    assert "invalid literal for int()" in start("zeus").found["error"]


def test_on_gh200_both_add_the_processor_that_nvml_counts_already(start: Start, node: Node, gpus: FakeNvml) -> None:
    gpus.show(*(replace(gpu, model="NVIDIA GH200 120GB") for gpu in GPUS))
    ours, zeus, codecarbon = start("ours"), start("zeus"), start("codecarbon")
    for label in ("0", "1"):
        node.feed(label, 100)
    gpus.show(*(replace(gpu, model="NVIDIA GH200 120GB", energy_mj=gpu.energy_mj + 300_000) for gpu in GPUS))
    assert sum(part["energy_j"] for part in ours.read().values()) == pytest.approx(600)
    for other in (zeus, codecarbon):
        assert sum(sum(figures) for figures in other.read().values()) == pytest.approx(800)
