"""Accelerators as their data sheets state them, and the part of the peak that a large matrix product reaches.

Peaks are dense (no sparsity), bandwidths count one direction, everything is per accelerator as software sees it: one of
the two dies of an MI250X is a rank of its own. `domain` is how many accelerators share the fast link: eight in a usual
node, four in a GH200 or Cray EX blade, 72 in an NVL72 rack. A data sheet is not a measurement: what training reaches of
it is in hpc/plan/step_time.py.

Sources, read 2026-11-25, by number in `source`:
[1] stas00/ml-engineering compute/accelerator/README.md @ b9e2972 (peaks, memory, measured matrix products)
[2] stas00/ml-engineering network/README.md @ 0030e63 (NVLink, Infinity Fabric, 400 Gb/s InfiniBand per H100)
[3] verda.com/blog/gb300-nvl72-architecture (GB300, B300), glennklockwood.com/garden/processors (B200, B300, A100)
[4] mosaicml/llm-foundry scripts/train/benchmarking/README.md @ 061f2c7 (1600 Gb/s between nodes of eight A100)
[5] docs.lumi-supercomputer.eu, LUMI-G (four 200 Gb/s interfaces for eight dies)
[6] apps.fz-juelich.de/jsc/hps/jupiter/configuration.html (GH200: 96 GB at 4 TB/s, NDR200, 680 W)
[7] aiwiki.ai and rooflinenotes.dev/accelerators (MI325X, MI355X)
[8] citsjtu2020/LLM-Prof hardware_spec.md (H20, H800, A10, L20), maosong.website/p/nvidia-gpu-specs (V100)
[9] stored files 54498307300, 62005427167, 55961688160 (MI250), databricks.com/blog/training-llms-scale-amd-mi250-gpus
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hpc.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One accelerator and the links that it sits on."""

    name: str
    family: str
    """Generation: what part of the peak training reaches is a property of it (hpc/plan/step_time.py)."""
    flops: Mapping[str, float]
    """Dense peak by precision (bf16, fp8, fp4), FLOP/s. A precision that is not listed runs as the next wider one."""
    memory_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    """To the other accelerators of the domain together, one direction."""
    network_bytes_per_s: float
    """Share of the node's network of one accelerator, one direction."""
    domain: int
    """Accelerators that share the fast link."""
    power_w: float
    exponentials_per_s: float
    """exp() a second outside the matrix units: what the softmax of attention waits for."""
    source: str

    def peak(self, precision: str) -> float:
        """Dense peak at a precision, or at the next wider one that this accelerator has."""
        order = ("fp4", "fp8", "bf16")
        for wider in order[order.index(precision) :]:
            if wider in self.flops:
                return self.flops[wider]
        return self.flops["bf16"]


_EXPONENTIALS = {"B200": 5e12, "GB200": 5e12, "B300": 10.7e12, "GB300": 10.7e12, "H20": 4.1e12, "H100-PCIe": 3.3e12}
"""[3]; the H100 has as many units as the B200 (vanshverma.com/notes/flashattention-4-blackwell). Elsewhere the ratio of
the H100's, one for 240 FLOP."""


def _accelerator(
    name: str,
    family: str,
    tflops: tuple[float, ...],
    memory_gb: float,
    hbm_tb_s: float,
    links_gb_s: tuple[float, float],
    domain: int,
    power_w: float,
    source: str,
) -> Accelerator:
    """From the units of data sheets: TFLOP/s at bf16, fp8, fp4; GB; TB/s; GB/s of (fast link, network); W."""
    return Accelerator(
        name,
        family,
        {precision: value * 1e12 for precision, value in zip(("bf16", "fp8", "fp4"), tflops, strict=False)},
        memory_gb * 1e9,
        hbm_tb_s * 1e12,
        links_gb_s[0] * 1e9,
        links_gb_s[1] * 1e9,
        domain,
        power_w,
        _EXPONENTIALS.get(name, tflops[0] * 1e12 / 240),
        source,
    )


_LIST = (
    _accelerator("V100", "volta", (125,), 16, 0.9, (150, 12.5), 8, 300, "[2][8]; network: one 100 Gb/s port, assumed"),
    _accelerator("A100-40GB", "ampere", (312,), 40, 1.555, (300, 25), 8, 400, "[2][3][4]"),
    _accelerator("A100", "ampere", (312,), 80, 2.039, (300, 25), 8, 400, "[2][3][4]"),
    _accelerator("A800", "ampere", (312,), 80, 2.039, (200, 25), 8, 400, "[8]; network as A100"),
    _accelerator("H100", "hopper", (989, 1979), 80, 3.35, (450, 50), 8, 700, "[1][2]"),
    _accelerator("H100-PCIe", "hopper", (756, 1513), 80, 2.0, (63, 50), 8, 350, "[1][2]; power: half of SXM, assumed"),
    _accelerator("H800", "hopper", (989, 1979), 80, 3.35, (200, 50), 8, 700, "[8]; network as H100"),
    _accelerator("H200", "hopper", (989, 1979), 141, 4.8, (450, 50), 8, 700, "[1][2]"),
    _accelerator("H20", "hopper", (148, 296), 96, 4.0, (450, 50), 8, 400, "[8]; power assumed"),
    _accelerator("GH200", "hopper", (989, 1979), 96, 4.0, (450, 25), 4, 680, "[1][6]"),
    _accelerator("B200", "blackwell", (2250, 4500, 9000), 192, 8.0, (900, 50), 8, 1000, "[1][2][3]; network as H100"),
    _accelerator("B300", "blackwell", (2250, 4500, 13125), 288, 8.0, (900, 100), 8, 1100, "[3]"),
    _accelerator(
        "GB200", "blackwell", (2500, 5000, 10000), 192, 8.0, (900, 50), 72, 1200, "[1][2][3]; network as H100"
    ),
    _accelerator("GB300", "blackwell", (2500, 5000, 15000), 288, 8.0, (900, 100), 72, 1400, "[3]"),
    _accelerator("MI250X", "cdna2", (191.5,), 64, 1.64, (350, 12.5), 8, 280, "[1][2][5]; one die of two"),
    _accelerator("MI250", "cdna2", (362.1,), 128, 3.2, (300, 25), 4, 500, "[9]; a card, both dies; four cards a node"),
    _accelerator("MI300X", "cdna3", (1307.4, 2614.9), 192, 5.3, (448, 50), 8, 750, "[1][2]; network as H100"),
    _accelerator("MI325X", "cdna3", (1307.4, 2614.9), 256, 6.0, (448, 50), 8, 1000, "[2][7]; network as H100"),
    _accelerator("MI350X", "cdna4", (2300, 4600, 9200), 288, 8.0, (448, 50), 8, 1000, "[1][7]; links as MI325X"),
    _accelerator("MI355X", "cdna4", (2500, 5000, 10000), 288, 8.0, (448, 50), 8, 1400, "[7]; links as MI325X"),
    _accelerator("L40S", "ada", (362, 733), 48, 0.864, (31, 25), 8, 350, "[1][2]; PCIe; power and network assumed"),
    _accelerator("A10", "ampere", (125,), 24, 0.6, (31, 12.5), 8, 150, "[8]; PCIe; power and network assumed"),
)

ACCELERATORS: Mapping[str, Accelerator] = {item.name: item for item in _LIST}
"""Known accelerators by name."""

_ALIASES = {
    "A10040GB": "A100-40GB", "A10080GB": "A100", "H100PCIE": "H100-PCIe", "MI355": "MI355X",
    "MI350": "MI350X", "MI300": "MI300X", "MI325": "MI325X", "MI250XGCD": "MI250X", "GH20096GB": "GH200",
    "LUMI": "MI250X", "FRONTIER": "MI250X",
}  # fmt: skip
_NOISE = ("NVIDIA", "AMD", "INSTINCT", "TESLA", "DGX", "HGX", "SXM5", "SXM4", "SXM3", "SXM2", "SXM", "GPUS", "GPU",
          "NVL72", "SUPERCHIP", "HOPPER", "BLACKWELL", "SUPERPOD", "EOS", "OAM")  # fmt: skip


def find(name: str) -> Accelerator:
    """The accelerator meant by a name as people write it: 'DGX-GB200', 'NVIDIA A100-SXM4-80GB', 'mi300x', 'H100 SXM'.

    ConfigError names the known ones.
    """
    key = "".join(letter for letter in name.upper() if letter.isalnum())
    key = re.sub(r"^\d+X(?=[A-Z])", "", key)  # '8xH100'
    for word in _NOISE:
        key = key.replace(word, "")
    known = {"".join(c for c in item.upper() if c.isalnum()): item for item in ACCELERATORS}
    known.update(_ALIASES)
    fitting = [plain for plain in known if key.startswith(plain)] if key else []
    if not fitting:
        raise ConfigError(f"hardware {name!r} is not known here: take one of {', '.join(ACCELERATORS)}")
    return ACCELERATORS[known[max(fitting, key=len)]]
