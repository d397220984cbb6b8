"""ACPI power meters through hwmon: NVIDIA Grace's per-socket meters, and the meter of a whole server.

/sys/class/hwmon/hwmonK[/device]/power1_average in microwatts, a mean over power1_average_interval; power1_oem_info
says what it measures: on Grace "Module Power Socket 0", "Grace Power Socket 0", "CPU Power Socket 0", "SysIO Power
Socket 0". A module contains its Grace and its GPU, a Grace contains its CPU, its memory and its SysIO: the cover rule
takes the widest. A meter that says nothing of the sort (driver `power_meter`) is that of the server's supply.
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
        self.provenance = f"measured: ACPI power meter '{name}', integrated at the sampling rate"
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
        file = next(
            (path for path in (device / "device" / "power1_average", device / "power1_average") if path.exists()), None
        )
        if file is None:
            continue
        label = _text(file.with_name("power1_oem_info"))
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


def _text(path: Path) -> str:
    try:
        return read_text(path).strip()
    except (OSError, ValueError):
        return ""
