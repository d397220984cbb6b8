"""AMD GPUs through AMD SMI (amdsmi, which comes with ROCm and must match it): accumulator x resolution = microjoules.

* MI250X and MI250 are two devices on one board: the even one's counter holds both dies, the odd one's is 0 or absent.
* MI300A is processor, GPU and memory in one socket: so is its counter, and no RAPL package is added beside it.
* MI100's counter is wrong: refused.
"""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from hpc.energy.counters.base import CumulativeCounter, Part, Scope, first_line
from hpc.energy.counters.sysfs import socket_of_device

DRIVER = "sys/module/amdgpu"
MEASURED = "measured: AMD SMI energy counter"


class AmdGpu(CumulativeCounter):
    """One AMD GPU board."""

    unit = "accumulator x resolution uJ"

    def __init__(self, library: Any, handle: Any, name: str, scope: Scope, parts: frozenset[Part], what: str) -> None:
        self.scope, self.provenance = scope, f"{MEASURED}{what}"
        self._library, self._handle = library, handle
        super().__init__(name, parts)
        self.open()

    def is_mirrored_by(self, other: "AmdGpu") -> bool:
        """Whether both show one counter: the other's value lies between two readings of this one in a row."""
        return self._joules() <= other._joules() <= self._joules()

    def _joules(self) -> float:
        value = energy_j(self._library.amdsmi_get_energy_count(self._handle))
        if value is None:
            raise ValueError("it has no value")
        return value


def energy_j(answer: dict[str, Any]) -> float | None:
    """Joules in an answer of amdsmi_get_energy_count; None for 0 and for 'N/A', which stand for a missing counter.

    Before ROCm 6 the accumulator was called 'power'.
    """
    accumulator, resolution = answer.get("energy_accumulator", answer.get("power")), answer.get("counter_resolution")
    if not isinstance(accumulator, int | float) or not isinstance(resolution, int | float):
        return None
    return accumulator * resolution / 1e6 or None


def find(root: Path) -> tuple[list[AmdGpu], list[str], list[str]]:
    """GPUs that can be measured, notes, and the names of those that cannot."""
    if not (root / DRIVER).exists():
        return [], [], []
    try:
        with redirect_stdout(StringIO()):  # it prints when its library is missing
            import amdsmi

        amdsmi.amdsmi_init()
        handles = list(amdsmi.amdsmi_get_processor_handles())
    except Exception as error:  # without its library the package fails at import, with whatever comes first
        note = f"AMD GPUs: {first_line(error)}: install the amdsmi package of this ROCm (/opt/rocm/share/amd_smi)"
        return [], [note], ["AMD GPUs"]
    found: list[AmdGpu] = []
    notes: list[str] = []
    unmeasured: list[str] = []
    for index, handle in enumerate(handles):
        try:
            counter, note = _counter(amdsmi, handle, index, root, found[-1] if found else None)
        except Exception as error:  # amdsmi of another ROCm raises more than its own exceptions; other GPUs still count
            counter, note = None, f"amd gpu{index}: {first_line(error)}"
        if counter is not None:
            found.append(counter)
        elif not note.endswith("counts it"):
            unmeasured.append(f"amd gpu{index}")
        if note:
            notes.append(note)
    return found, notes, unmeasured


def _counter(library: Any, handle: Any, index: int, root: Path, before: AmdGpu | None) -> tuple[AmdGpu | None, str]:
    name, model = f"amd gpu{index}", str(library.amdsmi_get_gpu_asic_info(handle).get("market_name", ""))
    bus = library.amdsmi_get_gpu_device_bdf(handle)
    socket = socket_of_device(root, str(bus))
    part = Part("gpu", socket, f"amd {index}")
    if "MI100" in model:
        return None, f"{name} ({model}): its energy counter is wrong, not measured"
    if "MI250" in model:
        return _die(
            library, handle, name, model, part, before if before and before.name == f"amd gpu{index - 1}" else None
        )
    if "MI300A" in model:
        place = index if socket is None else socket
        parts = frozenset({part, Part("cpu", place), Part("dram", place)})
        return AmdGpu(library, handle, name, "module", parts, f" ({model}: the whole socket)"), ""
    return AmdGpu(library, handle, name, "gpu", frozenset({part}), ""), ""


def _die(
    library: Any, handle: Any, name: str, model: str, part: Part, neighbour: AmdGpu | None
) -> tuple[AmdGpu | None, str]:
    """One die of a board of two: counted unless it has no counter, or shows its neighbour's."""
    try:
        counter = AmdGpu(library, handle, name, "gpu", frozenset({part}), f" ({model}: both dies of the board)")
    except Exception:  # 0, 'N/A', or an error that depends on the ROCm: the second die has no counter of its own
        if neighbour:
            return None, f"{name} ({model}): the counter of {neighbour.name} counts it"
        return None, f"{name} ({model}): its board's counter is that of the other die, which is not shown here"
    if neighbour and neighbour.is_mirrored_by(counter):
        return None, f"{name} ({model}): the counter of {neighbour.name} counts it"
    return counter, ""
