"""The vendors' own Python packages on C libraries of the same interface, in processes of their own."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hpc.bench.fake_node import FakeGpu, FakeNvml, rapl
from hpc.energy.counters import amd_smi
from tests.energy.conftest import reader

GPUS = [FakeGpu(energy_mj=5_000_000_000), FakeGpu(energy_mj=77_000, bus="00000000:02:00.0")]


@pytest.fixture
def nvml(tmp_path: Path) -> FakeNvml:
    try:
        return FakeNvml(tmp_path)
    except FileNotFoundError as error:
        pytest.skip(f"the fake libnvidia-ml.so.1 is compiled: {error}")


def grown(*joules: float) -> list[FakeGpu]:
    return [replace(gpu, energy_mj=gpu.energy_mj + int(1000 * more)) for gpu, more in zip(GPUS, joules, strict=True)]


def test_real_nvml_bindings_give_each_gpus_energy_and_survive_a_driver_reload(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.show(*GPUS)
    with reader(tmp_path, nvml.environment) as node:
        assert node.found["counters"] == [["gpu0", "gpu"], ["gpu1", "gpu"]]
        nvml.show(*grown(700, 30.5))
        assert [part["energy_j"] for part in node.read().values()] == [700, 30.5]
        nvml.show(*(replace(gpu, energy_mj=40_000) for gpu in GPUS), life=2)
        first, second = node.read(), node.read()
    assert "gpu0 cannot be read: NVMLError_Uninitialized" in first["gpu0"]["notes"][0]
    assert first["gpu0"]["energy_j"] == 700
    assert second["gpu0"]["notes"][0].startswith("gpu0 answers again after")
    assert "gpu0 fell from 5000700 J to 40 J, taken for a restart" in second["gpu0"]["notes"][1]
    assert [part["energy_j"] for part in second.values()] == [740, 70.5]


def test_a_gpu_without_a_counter_is_integrated_or_named_and_mig_is_named(tmp_path: Path, nvml: FakeNvml) -> None:
    old = FakeGpu(energy_mj=-1, power_mw=100_000, model="Tesla P100")
    dark = FakeGpu(energy_mj=-1, power_mw=-1, model="Tesla K80")
    nvml.show(GPUS[0], old, dark, replace(GPUS[1], is_mig=True))
    with reader(tmp_path, nvml.environment) as node:
        found, reading = node.found, node.read()
    assert found["counters"] == [["gpu0", "gpu"], ["gpu1", "gpu"]]
    assert found["unmeasured"][2:4] == ["gpu2", "gpu3"]
    assert found["notes"] == [
        "NVML gpu2: Not Supported",
        "NVML gpu3 is in MIG mode, and a slice has no energy counter: not measured; ask for whole GPUs",
    ]
    assert reading["gpu1"]["power_w"] == 100
    assert 0 < reading["gpu1"]["energy_j"] < 100


def test_a_gh200_behind_the_real_bindings_covers_its_grace(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.show(FakeGpu(energy_mj=1, model="NVIDIA GH200 120GB"))
    rapl(tmp_path, "0", "package-0", 1)
    with reader(tmp_path, nvml.environment) as node:
        assert node.found["counters"] == [["gpu0", "module"]]
        assert "intel-rapl:0 package-0 is not added: gpu0 covers it" in node.found["notes"]


AMD_SOURCE = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
enum { OK = 0, NOT_SUPPORTED = 2 };
static char model[64];
static unsigned long long values[8];
static unsigned load(void) {
    FILE *file = fopen(getenv("FAKE_AMD"), "r");
    unsigned count = 0;
    if (!file || !fgets(model, sizeof model, file)) exit(1);
    model[strcspn(model, "\n")] = 0;
    while (count < 8 && fscanf(file, "%llu", &values[count]) == 1) ++count;
    fclose(file);
    return count;
}
int amdsmi_init(uint64_t flags) { (void)flags; return OK; }
int amdsmi_get_socket_handles(uint32_t *count, void **handles) {
    if (handles) handles[0] = (void *)1;
    *count = 1;
    return OK;
}
int amdsmi_get_processor_handles(void *socket, uint32_t *count, void **handles) {
    (void)socket;
    *count = load();
    for (uint32_t place = 0; handles && place < *count; ++place) handles[place] = (void *)(uintptr_t)(place + 1);
    return OK;
}
int amdsmi_get_gpu_asic_info(void *handle, char *info) { (void)handle; load(); strcpy(info, model); return OK; }
int amdsmi_get_gpu_device_bdf(void *handle, uint64_t *bdf) { *bdf = (uint64_t)(uintptr_t)handle << 8; return OK; }
int amdsmi_get_energy_count(void *handle, uint64_t *value, float *resolution, uint64_t *when) {
    load();
    *value = values[(uintptr_t)handle - 1];
    *resolution = 15.3f;
    *when = 1;
    return *value == 1 ? NOT_SUPPORTED : OK;
}
"""


def test_real_amdsmi_bindings_give_a_board_of_two_dies_once(tmp_path: Path, python_with: Callable[[str], str]) -> None:
    """The second board's second die says "not supported" where the first board's shows 0."""
    python = python_with("amdsmi")
    code = "import importlib.util; print(importlib.util.find_spec('amdsmi').submodule_search_locations[0])"
    package = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    wrapper = (Path(package) / "amdsmi_wrapper.py").read_text()
    asked = set(re.findall(r"_libraries\['libamd_smi.so'\]\.(\w+)", wrapper))
    stubs = "".join(
        f"int {name}(void) {{ return NOT_SUPPORTED; }}\n" for name in asked if f" {name}(" not in AMD_SOURCE
    )
    (tmp_path / "amd.c").write_text(AMD_SOURCE + stubs)
    (tmp_path / "lib").mkdir()
    library = str(tmp_path / "lib/libamd_smi.so")
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "amd.c")], check=True)
    except FileNotFoundError:
        pytest.skip("the fake libamd_smi.so is compiled: no C compiler (cc)")
    (tmp_path / amd_smi.DRIVER).mkdir(parents=True)
    state = tmp_path / "amd.txt"
    state.write_text(f"AMD Instinct MI250X\n{10**12} 0 {3 * 10**12} 1\n")
    with reader(tmp_path, {"ROCM_PATH": str(tmp_path), "FAKE_AMD": str(state)}, python) as node:
        assert node.found["counters"] == [["amd gpu0", "gpu"], ["amd gpu2", "gpu"]]
        model = "AMD Instinct MI250X"
        assert node.found["notes"] == [
            f"amd gpu1 ({model}): the counter of amd gpu0 counts it",
            f"amd gpu3 ({model}): the counter of amd gpu2 counts it",
        ]
        state.write_text(f"AMD Instinct MI250X\n{10**12 + 10**7} 0 {3 * 10**12 + 2 * 10**7} 1\n")
        joules = [part["energy_j"] for part in node.read().values()]
    assert joules == pytest.approx([153.0, 306.0], rel=1e-4)
