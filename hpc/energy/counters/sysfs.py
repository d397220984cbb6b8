"""Reading the kernel's small files, cheaply: a sampler does it many times a second for months."""

import os
from pathlib import Path

MOST_BYTES = 4096
"""A sysfs file holds at most one page."""


def read_text(path: Path) -> str:
    """One file in one read, as the kernel writes it. Opened each time: a handle would outlive a reloaded driver.

    Raises OSError, and ValueError for what is no text.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(handle, MOST_BYTES).decode()
    finally:
        os.close(handle)


def read_number(path: Path) -> float:
    """A file that holds one number. Raises OSError, ValueError."""
    return float(read_text(path))


def sockets(root: Path) -> dict[str, int]:
    """Socket of each logical CPU ('cpu12' -> 1), numbered from 0 in the order of the kernel's package ids.

    Empty where the kernel does not tell (a fake tree).
    """
    ids: dict[str, int] = {}
    for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/physical_package_id"):
        try:
            ids[path.parent.parent.name] = int(read_number(path))
        except (OSError, ValueError):
            continue
    order = sorted(set(ids.values()))
    return {cpu: order.index(package) for cpu, package in ids.items()}


def socket_of_device(root: Path, bus_id: str) -> int | None:
    """Socket that a PCI device ('00000009:01:00.0' or '0009:01:00.0') hangs on; None when the kernel does not tell."""
    domain, _, rest = bus_id.lower().partition(":")
    path = root / "sys/bus/pci/devices" / f"{domain[-4:]}:{rest}" / "local_cpulist"
    try:
        cpus = read_text(path).split(",")[0].split("-")[0].strip()
    except (OSError, ValueError):
        return None
    return sockets(root).get(f"cpu{cpus}")
