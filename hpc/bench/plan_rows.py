"""Published training runs as rows of a CSV: from the spellings that people use to what the estimator takes.

Columns: hardware, gpus, model, precision, seq, gbs, mbs, tp, pp, vp, cp, ep, fsdp_or_dp, recompute, metric, value;
source and note are kept, others are ignored. An empty cell means 1, or what is usual. A row that cannot be scored keeps
the reason and is shown with it.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc.errors import ConfigError, GreenMoEError
from hpc.plan import catalogue, hardware
from hpc.plan.hardware import Accelerator
from hpc.plan.shapes import Shape
from hpc.plan.step_time import FORMAT_OF, Layout

PUBLISHED = Path(catalogue.__file__).parent / "published.csv"
REQUIRED = ("hardware", "model", "metric", "value")
LARGEST = 1e15
BYTES_OF_A_WEIGHT = 6
"""bf16 weight and fp32 gradient, which a rank holds whole unless weights are sharded."""


@dataclass(frozen=True)
class Metric:
    """What a value counts."""

    kind: str
    """tokens, tokens of all, flops, utilization, step, samples, hours."""
    scale: float = 1.0
    """From the value to seconds, tokens, samples or FLOP/s; utilization is a fraction."""
    per_rank: bool = True
    causal: bool | None = None
    """Attention counted under the causal mask; None: not said."""
    hardware: bool = False
    """Recomputed work counts (HFU)."""


@dataclass(frozen=True)
class Row:
    """One published run."""

    cells: Mapping[str, str]
    shape: Shape | None = None
    layout: Layout | None = None
    accelerator: Accelerator | None = None
    metric: Metric | None = None
    measured: float | None = None
    """In seconds, tokens, samples, FLOP/s; utilization as a fraction."""
    unit: float = 1.0
    """`measured` over the cell's value."""
    assumed: tuple[str, ...] = ()
    """Empty cells that matter and were filled with what is usual."""
    reason: str | None = None
    """Why it cannot be scored."""

    @property
    def source(self) -> str:
        """Repository or paper, without the file: what leave-one-source-out leaves out."""
        stated = self.cells.get("source")
        return re.split(r"[\s,]", stated)[0] if stated else "not stated"


def read(path: Path) -> list[Row]:
    """Rows of a CSV. ConfigError names a column that is missing, or why the file cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [(name or "").strip().lower() for name in reader.fieldnames or []]
            missing = [name for name in REQUIRED if name not in columns]
            if missing:
                has = ", ".join(columns) or "nothing"
                raise ConfigError(f"{path}: no column {missing[0]!r}; the first line has {has}")
            reader.fieldnames = columns
            lines = [{k: (v or "").strip() for k, v in line.items() if isinstance(k, str) and not isinstance(v, list)}
                     for line in reader]  # fmt: skip
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as CSV: {error}") from error
    return [parse(cells) for cells in lines if any(cells.values())]


def parse(cells: Mapping[str, str]) -> Row:
    """A row from its cells, with the reason when it cannot be scored."""
    try:
        accelerator = hardware.find(cells["hardware"])
        shape = catalogue.find(cells["model"])
        metric = _metric(cells["metric"])
        measured = _number(cells["value"], "value")
        if measured is None or measured <= 0:
            raise ConfigError(f"value {cells['value']!r} is not a positive number")
        layout = _layout(cells, shape, accelerator)
    except GreenMoEError as error:
        return Row(cells, reason=str(error))
    unit = 0.01 if metric.kind == "utilization" and measured > 1 else metric.scale
    assumed = [name for name in ("gpus", "precision", "seq", "gbs", "mbs") if not cells.get(name)]
    assumed += ["vp"] if layout.pipeline > 1 and not cells.get("vp") else []
    assumed += ["ep"] if shape.moe_layers and not cells.get("ep") else []
    return Row(cells, shape, layout, accelerator, metric, measured * unit, unit, tuple(assumed))


def _number(text: str, name: str) -> float | None:
    """'1,024', '8k', '4M', '2.5', '1 (0)', '8x8'; None when empty or not applicable."""
    plain = text.strip().lower().replace(",", "").replace("_", "")
    if plain in ("", "n/a", "na", "-", "none", "nan", "/", "?", "unknown", "default"):
        return None
    product = re.match(r"^(\d+)\s*[x*]\s*(\d+)", plain)
    if product:
        return float(product[1]) * float(product[2])
    found = re.match(r"^[~≈]?\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(k|m|b)?", plain)
    if not found:
        raise ConfigError(f"{name} {text!r} is not a number")
    unit = {"k": 1024.0 if name == "seq" else 1e3, "m": 1e6, "b": 1e9, None: 1.0}[found[2]]
    value = float(found[1]) * unit
    if value > LARGEST:
        raise ConfigError(f"{name} {text!r} is too large")
    return value


def _count(cells: Mapping[str, str], name: str) -> int | None:
    value = _number(cells.get(name, ""), name)
    return None if value is None else max(1, round(value))


def _layout(cells: Mapping[str, str], shape: Shape, accelerator: Accelerator) -> Layout:
    tp, pp, cp = (_count(cells, name) or 1 for name in ("tp", "pp", "cp"))
    gpus = _count(cells, "gpus") or max(8, tp * pp * cp)
    if gpus < tp * pp * cp:
        raise ConfigError(f"tp {tp} x pp {pp} x cp {cp} are more than {gpus} gpus")
    seq = _count(cells, "seq") or 4096
    replicas = gpus // (tp * pp * cp)
    batch = _count(cells, "gbs")
    if batch is not None and batch > 65536 and batch >= 16 * seq:  # tokens, not sequences
        batch = max(1, round(batch / seq))
    micro = _count(cells, "mbs")
    if micro is None:
        most = max(1, 8192 // seq)
        micro = most if batch is None else max(1, min(most, batch // replicas))
    if batch is None:
        batch = replicas * micro * (4 * pp if pp > 1 else 4)
    expert = _count(cells, "ep")
    if expert is None:
        expert = min(shape.experts, 8, gpus // pp) if shape.moe_layers else 1
    expert = min(expert, shape.experts, max(1, gpus // pp)) if shape.moe_layers else 1
    zero_stage, shard = _sharding(cells, shape, accelerator, tp, pp, replicas * cp)
    virtual = _count(cells, "vp")
    if virtual is None:
        virtual = 1 if cells.get("vp") else _virtual(shape, pp, batch / (replicas * micro))
    return Layout(
        gpus=gpus, seq=seq, global_batch=batch, micro_batch=micro, tensor=tp, pipeline=pp,
        virtual=virtual, context=cp, expert=expert, zero_stage=zero_stage, shard=shard,
        recompute=_recompute(cells.get("recompute", "")), precision=precision(cells.get("precision", "")),
        unfused=_before_flash_attention(cells.get("precision", ""), accelerator),
        eager=not shape.moe_layers and bool(re.search("fsdp|shard", cells.get("fsdp_or_dp", ""), re.IGNORECASE)),
    )  # fmt: skip


def _before_flash_attention(text: str, accelerator: Accelerator) -> bool:
    """FlashAttention does not run on Volta; on Ampere, fp16 is what ran before it and before bf16."""
    half = "fp16" in text.lower() or "float16" in text.lower().replace("bfloat16", "")
    return accelerator.family == "volta" or (accelerator.family == "ampere" and half)


def _virtual(shape: Shape, pp: int, micro_batches: float) -> int:
    """Virtual stages where not stated: one, unless the bubble would be large and a stage has layers to split."""
    if pp == 1 or (pp - 1) / micro_batches < 0.15:
        return 1
    layers = max(shape.attention_layers, shape.mamba_layers)
    return max(1, min(8, layers // pp))


def _sharding(
    cells: Mapping[str, str], shape: Shape, accelerator: Accelerator, tp: int, pp: int, replicas: int
) -> tuple[int, int | None]:
    """ZeRO stage and, for hybrid sharding, the ranks it shards over.

    The column may say a kind ('FSDP', 'zero2'), a flag (1, 0), or a size that means either; a size is sharding of
    weights where they would not fit whole.
    """
    text = re.sub(r"[\s_-]", "", cells.get("fsdp_or_dp", "").lower())
    if "hsdp" in text or "hybrid" in text:
        return 3, accelerator.domain
    if any(word in text for word in ("fsdp", "fullshard", "zero3", "true", "yes", "on")):
        return 3, None
    if any(word in text for word in ("zero2", "zero1", "distopt", "distributedopt")):
        return 1, None
    if "ddp" in text or text in ("0", "dp", "false", "no", "off"):
        return 1, None
    whole = BYTES_OF_A_WEIGHT * shape.dense_parameters / (tp * pp) > 0.8 * accelerator.memory_bytes
    if text == "1" and replicas > 1:
        return 3, None
    return (3 if whole and replicas > 1 else 1), None


def _recompute(text: str) -> str:
    plain = text.strip().lower()
    if plain in ("", "none", "no", "false", "0", "n/a", "-", "off"):
        return "none"
    if any(word in plain for word in ("full", "true", "yes", "all", "on", "1")) and "selective" not in plain:
        return "full"
    return "selective"


def precision(text: str) -> str:
    """The recipe meant: 'FP8-CS', 'mxfp8', 'NVFP4', 'amp_bf16', 'fp8 blockwise', 'bf16+fp8'."""
    plain = re.sub(r"[\s_-]", "", text.lower())
    if "fp4" in plain:
        return "nvfp4"
    if "mx" in plain:
        return "mxfp8"
    if "fp8" in plain or "float8" in plain or "e4m3" in plain:
        fine = any(word in plain for word in ("block", "128", "subchannel", "fp8sc", "deepseek"))
        return "fp8_block" if fine else "fp8"
    if not plain or any(word in plain for word in ("bf16", "fp16", "float16", "half", "16", "amp", "mixed")):
        return "bf16"
    raise ConfigError(f"precision {text!r} is not modelled: one of bf16, fp16, fp8, fp8 blockwise, mxfp8, nvfp4")


def _metric(text: str) -> Metric:
    """What a metric's name says, in many spellings."""
    plain = re.sub(r"[\s_()-]+", " ", text.lower()).replace("per", "/").replace(" / ", "/").strip()
    causal = False if "full attention" in plain or "non causal" in plain else True if "causal" in plain else None
    counted = "hfu" in plain or "hardware" in plain
    ranked = any(word in plain for word in ("gpu", "device", "rank", "chip", "gcd", "accelerator"))
    if "mfu" in plain or "hfu" in plain or "utili" in plain or plain in ("% of peak", "percent of peak"):
        return Metric("utilization", causal=causal, hardware=counted)
    if "flop" in plain:
        scales = {"pflop": 1e15, "petaflop": 1e15, "gflop": 1e9}
        scale = next((value for name, value in scales.items() if name in plain), 1e12)
        return Metric("flops", scale, ranked or scale < 1e15, causal, counted)
    if "hour" in plain or "day" in plain:
        hours = 24.0 if "day" in plain else 1.0
        tokens = 1e9 if "billion" in plain or "/b" in plain else 1e12
        if "gpu" not in plain and "device" not in plain:
            raise ConfigError(f"metric {text!r}: hours or days of how many GPUs? use GPU-hours per trillion tokens")
        return Metric("hours", hours * 3600 / tokens)
    if any(word in plain for word in ("step", "iter", "time", "latency")) and "/s" not in plain.replace("/step", ""):
        return Metric("step", 1e-3 if re.search(r"\bms\b|milli", plain) else 1.0)
    if "sample" in plain or "seq" in plain:
        return Metric("samples", per_rank=ranked)
    if any(word in plain for word in ("tok", "tps", "tgs", "wps", "throughput")):
        ranked = ranked or plain in ("tgs", "tps", "wps")
        scale = 1e3 if re.search(r"\bk ?tok|kilo", plain) else 1.0
        return Metric("tokens" if ranked else "tokens of all", scale, ranked)
    raise ConfigError(
        f"metric {text!r} is not known: one of tokens/s/GPU, tokens/s, TFLOP/s/GPU, MFU, step time (s), samples/s, "
        "GPU-hours per trillion tokens"
    )


def counts_causal(row: Row) -> bool:
    """Whether attention is counted under the mask where the metric does not say it.

    MFU counts it in full (arXiv:2204.02311), and so do PyTorch's trainers; Megatron's TFLOP halve it since 2025, which
    is where Blackwell and most Hopper figures come from.
    """
    assert row.metric is not None
    assert row.accelerator is not None
    assert row.layout is not None
    if row.metric.causal is not None:
        return row.metric.causal
    recent = row.accelerator.family in ("hopper", "blackwell", "cdna3", "cdna4")
    return row.metric.kind == "flops" and recent and not row.layout.eager


def predicted(row: Row, seconds: float) -> float:
    """The row's metric, for a step of so many seconds, in the units of `measured`."""
    shape, layout, hw, metric = row.shape, row.layout, row.accelerator, row.metric
    assert shape is not None
    assert layout is not None
    assert hw is not None
    assert metric is not None
    tokens = layout.global_batch * layout.seq / seconds
    if metric.kind == "step":
        return seconds
    if metric.kind == "samples":
        return layout.global_batch / seconds / (layout.gpus if metric.per_rank else 1)
    if metric.kind == "tokens of all":
        return tokens
    if metric.kind == "tokens":
        return tokens / layout.gpus
    if metric.kind == "hours":
        return layout.gpus / tokens
    flops = shape.training_flops(layout.seq, counts_causal(row)) * tokens
    if metric.hardware and layout.recompute == "full":
        flops *= 4 / 3
    if metric.kind == "flops":
        return flops / (layout.gpus if metric.per_rank else 1)
    return flops / layout.gpus / hw.peak(FORMAT_OF[layout.precision])
