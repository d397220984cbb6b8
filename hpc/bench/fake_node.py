"""A node's power counters where there are none: files as the kernel shows them, and a libnvidia-ml.so.1 in C.

Everything that reads them is the real thing: our counters, nvidia-ml-py, and other people's meters. The C library looks
at a text file (environment variable FAKE_NVML): the number of the driver's life on the first line, then one line a GPU,
`energy_mj power_mw is_mig bus_id model`, where -1 stands for "not supported". A new number is a reloaded driver: all
calls fail until nvmlInit.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

NVML_SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { char old[16]; unsigned domain, bus, device, id, sub; char bus_id[32]; } Pci;
typedef struct { long long energy, power; int mig; char bus[32], model[64]; } Gpu;
enum { OK = 0, UNINITIALIZED = 1, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9 };
static long long life = -1;
static Gpu gpus[16];
static int load(unsigned *count, long long *now) {
    FILE *file = fopen(getenv("FAKE_NVML") ? getenv("FAKE_NVML") : "", "r");
    if (!file || fscanf(file, "%lld", now) != 1) { if (file) fclose(file); return DRIVER_NOT_LOADED; }
    for (*count = 0; *count < 16; ++*count) {
        Gpu *gpu = &gpus[*count];
        if (fscanf(file, "%lld %lld %d %31s %63[^\n]",
                   &gpu->energy, &gpu->power, &gpu->mig, gpu->bus, gpu->model) != 5) break;
    }
    fclose(file);
    return OK;
}
static int check(void *handle, Gpu **gpu) {
    unsigned count; long long now;
    int code = load(&count, &now);
    if (code) return code;
    if (now != life) return UNINITIALIZED;
    if ((size_t)handle < 1 || (size_t)handle > count) return NOT_FOUND;
    *gpu = &gpus[(size_t)handle - 1];
    return OK;
}
#define ENTER(handle) Gpu *gpu; int code = check(handle, &gpu); if (code) return code
int nvmlInitWithFlags(unsigned flags) { unsigned count; (void)flags; return load(&count, &life); }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == NOT_SUPPORTED ? "Not Supported" : "fake error"; }
int nvmlDeviceGetCount_v2(unsigned *count) {
    long long now;
    int code = load(count, &now);
    return code ? code : now == life ? OK : UNINITIALIZED;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(size_t)(index + 1);
    ENTER(*handle);
    return OK;
}
int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
    ENTER(handle);
    snprintf(text, size, "GPU-%zu", (size_t)handle);
    return OK;
}
int nvmlDeviceGetHandleByUUID(const char *text, void **handle) {
    *handle = (void *)(size_t)atoi(text + 4);
    ENTER(*handle);
    return OK;
}
int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
    ENTER(handle);
    snprintf(text, size, "%s", gpu->model);
    return OK;
}
int nvmlDeviceGetPciInfo_v3(void *handle, Pci *pci) {
    ENTER(handle);
    memset(pci, 0, sizeof *pci);
    snprintf(pci->bus_id, sizeof pci->bus_id, "%s", gpu->bus);
    return OK;
}
int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *later) {
    ENTER(handle);
    *now = *later = gpu->mig;
    return OK;
}
int nvmlDeviceGetArchitecture(void *handle, unsigned *number) { ENTER(handle); *number = 9; return OK; }
int nvmlDeviceGetMemoryInfo(void *handle, void *memory) { ENTER(handle); (void)memory; return NOT_SUPPORTED; }
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *energy) {
    ENTER(handle);
    if (gpu->energy < 0) return NOT_SUPPORTED;
    *energy = gpu->energy;
    return OK;
}
int nvmlDeviceGetPowerUsage(void *handle, unsigned *power) {
    ENTER(handle);
    if (gpu->power < 0) return NOT_SUPPORTED;
    *power = gpu->power;
    return OK;
}
"""


@dataclass(frozen=True)
class FakeGpu:
    """What the C library tells of one GPU."""

    energy_mj: int = 0
    power_mw: int = 300_000
    is_mig: bool = False
    bus: str = "00000000:01:00.0"
    model: str = "NVIDIA H100 80GB HBM3"


class FakeNvml:
    """The compiled library and the file that it looks at."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError where there is no C compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise FileNotFoundError("no C compiler (cc, gcc)")
        source, self._state = folder / "nvml.c", folder / "nvml.txt"
        source.write_text(NVML_SOURCE)
        library = folder / "libnvidia-ml.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
        self.environment = {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML": str(self._state)}
        """What a process needs to be served."""

    def show(self, *gpus: FakeGpu, life: int = 1) -> None:
        """Change all figures at once."""
        lines = [f"{gpu.energy_mj} {gpu.power_mw} {int(gpu.is_mig)} {gpu.bus} {gpu.model}" for gpu in gpus]
        write(self._state, "\n".join([str(life), *lines]))


def write(path: Path, text: object) -> None:
    """One file of a tree, changed as the kernel changes its own: a reader sees the old value or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(f"{text}\n")
    os.replace(staging, path)


def cray(
    root: Path, energy_j: int, power_w: int = 300, freshness: int = 1, inside: Mapping[str, int] = {}, **more: int
) -> Path:
    """/sys/cray/pm_counters. `inside`: joules of cpu, memory, accel0, ...; `more`: startup, generation."""
    folder = root / "sys/cray/pm_counters"
    for name, text in {
        "energy": f"{energy_j} J 17 us", "power": f"{power_w} W 17 us", "freshness": freshness, **more,
        **{f"{part}_energy": f"{joules} J 17 us" for part, joules in inside.items()},
    }.items():  # fmt: skip
        write(folder / name, text)
    return folder


def rapl(root: Path, label: str, name: str, microjoules: int, range_uj: int = 262_143_328_850) -> Path:
    """One powercap zone: label '0' (a package) or '0:1' (inside it)."""
    folder = root / "sys/class/powercap" / f"intel-rapl:{label}"
    for file, text in {"name": name, "energy_uj": microjoules, "max_energy_range_uj": range_uj}.items():
        write(folder / file, text)
    return folder


def acpi_meter(root: Path, number: int, label: str, microwatts: int) -> Path:
    """One ACPI power meter; an empty label is that of a whole server."""
    folder = root / f"sys/class/hwmon/hwmon{number}"
    write(folder / "name", "power_meter")
    for file, text in {"power1_average": microwatts, "power1_oem_info": label, "power1_average_interval": 50}.items():
        write(folder / "device" / file, text)
    return folder / "device"


def topology(root: Path, sockets: Iterable[int], devices: Mapping[str, int] = {}) -> None:
    """CPUs with the package ids of their sockets, and PCI devices (bus id -> CPU that they are next to)."""
    for cpu, socket in enumerate(sockets):
        write(root / f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id", socket)
    for bus, cpu in devices.items():
        write(root / "sys/bus/pci/devices" / bus / "local_cpulist", f"{cpu}-{cpu}")
