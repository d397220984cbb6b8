"""ACPI power meters through hwmon: NVIDIA Grace's per-socket meters, and the meter of a whole server.

/sys/class/hwmon/hwmonK[/device]/powerN_average in microwatts, a mean over powerN_average_interval milliseconds (50 on
Grace: one sample a second sees a twentieth of the time). powerN_oem_info says what it measures: on Grace "Module Power
Socket 0", "Grace Power Socket 0", "CPU Power Socket 0", "SysIO Power Socket 0". A module contains its Grace and its
GPU, a Grace contains its CPU, its memory and its SysIO: the cover rule takes the widest. A meter that says nothing of
the sort (driver `power_meter`) is that of the server's supply.
There is no counter of joules: power is read once a second and integrated.
Source: NVIDIA Grace Performance Tuning Guide, "Power and thermal"; Linux Documentation/hwmon/acpi_power_meter.
"""

import re
from pathlib import Path

from hpc.energy.counters.base import WHOLE_NODE, Kind, Part, PowerMeter, Scope
from hpc.energy.counters.sysfs import read_number, read_text

FOLDER = "sys/class/hwmon"
RAILS: dict[str, tuple[Scope, tuple[Kind, ...]]] = {
    "module": ("module", ("cpu", "dram", "sysio", "gpu")),
    "grace": ("grace", ("cpu", "dram", "sysio")),
    "cpu": ("package", ("cpu",)),
    "sysio": ("sysio", ("sysio",)),
}
"""First word of power1_oem_info -> what the meter covers on its socket."""


class HwmonMeter(PowerMeter):
    """One ACPI power meter."""

    unit = "uW"

    def __init__(self, file: Path, name: str, scope: Scope, parts: frozenset[Part]) -> None:
        self.scope = scope
        interval = _text(_beside(file, "average_interval"))
        mean = f" (each a mean over {interval} ms)" if interval else ""
        self.provenance = f"measured: ACPI power meter '{name}', integrated from samples{mean}"
        super().__init__(name, parts)
        self._file = file
        self.open()

    def _watts(self) -> float:
        microwatts = read_number(self._file)
        if microwatts == 0:
            raise ValueError("it shows 0 W, as a meter that is not connected does")
        return microwatts / 1e6


def find(root: Path) -> tuple[list[HwmonMeter], list[str]]:
    """All meters of the node, overlapping ones too, and notes on those that cannot be read."""
    meters: list[HwmonMeter] = []
    notes: list[str] = []
    for device in sorted((root / FOLDER).glob("hwmon*")):
        for file in sorted(device.glob("device/power*_average")) or sorted(device.glob("power*_average")):
            label = _text(_beside(file, "oem_info"))
            rail = re.match(r"(Module|Grace|CPU|SysIO) Power Socket (\d+)", label, re.IGNORECASE)
            try:
                if rail:
                    scope, kinds = RAILS[rail[1].lower()]
                    parts = frozenset(Part(kind, int(rail[2])) for kind in kinds)
                    meters.append(HwmonMeter(file, rail[0], scope, parts))
                elif _text(device / "name") == "power_meter":
                    meters.append(HwmonMeter(file, f"{device.name} power_meter", "node", WHOLE_NODE))
            except (OSError, ValueError) as error:
                notes.append(f"{device.name} {label}: {error}: ask the site to make /sys/class/hwmon readable")
    return meters, notes


def _beside(file: Path, what: str) -> Path:
    """power1_average -> power1_oem_info, and the like."""
    return file.with_name(f"{file.name.removesuffix('average')}{what}")


def _text(path: Path) -> str:
    try:
        return read_text(path).strip()
    except (OSError, ValueError):
        return ""
