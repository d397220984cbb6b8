"""Run by hpc.shrink.gguf in a process of its own: a .gguf file of full precision quantized into another.

    python -m hpc.shrink.gguf_quantize JOB.json

llama.cpp's arithmetic (`ggml_quantize_chunk`), with its mixes of types chosen in hpc.shrink.gguf_mix: the function that
has both, llama_model_quantize, is in no wheel that installs here. Rows are read from the mapped file some at a time, so
memory holds one quantized tensor and little more. An assertion of ggml ends the process, and this one only.
"""

import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import ArtifactError
from hpc.runtimes.llama_library import library
from hpc.shrink.gguf_mix import FILE_TYPES, Facts, choose_types

SLAB_BYTES = 16 << 20
"""Of fp32 rows that one call quantizes."""
QUANTIZATION_VERSION = 2
"""GGML_QNT_VERSION of the bound llama.cpp."""

Importance = Mapping[str, npt.NDArray[np.float32]]


def quantize(
    source: Path, out: Path, quantization: str, threads: int, overrides: Mapping[str, str], importance: Importance
) -> None:
    """Write `out` from a .gguf file in f32, f16 or bf16.

    overrides: see `choose_types`. importance: tensor -> (columns) or (experts, columns), how much each column counts; a
    row of zeros, an expert that no token went to, is rounded without. Raises ArtifactError for a matrix of importance
    that does not fit its tensor, or for values that cannot be quantized.
    """
    import gguf

    reader = gguf.GGUFReader(str(source))
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    types = choose_types(quantization, shapes, _facts(reader, bool(importance)), overrides)
    for name, values in importance.items():
        shape = shapes.get(name)
        if shape is None or values.shape not in (shape[-1:], (*shape[:-2], shape[-1])):
            raise ArtifactError(f"importance of {name} has the shape {values.shape}, the tensor {shape}")
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(str(out), _field(reader, "general.architecture"))
    _copy_facts(reader, writer)
    writer.add_file_type(FILE_TYPES[quantization][1])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    for tensor in reader.tensors:
        if tensor.name in types:
            kind = kinds[types[tensor.name]]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            bytes_shape = (*shapes[tensor.name][:-1], shapes[tensor.name][-1] // block * size)
            writer.add_tensor_info(tensor.name, bytes_shape, np.dtype(np.uint8), int(np.prod(bytes_shape)), kind)
        else:
            data = tensor.data
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with ThreadPoolExecutor(threads) as pool:
        for tensor in reader.tensors:
            if tensor.name in types:
                kind = kinds[types[tensor.name]]
                made = _quantized(tensor, shapes[tensor.name], kind, importance.get(tensor.name), pool)
                writer.write_tensor_data(made)
            else:
                writer.write_tensor_data(tensor.data)
    writer.close()


def _field(reader: Any, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _facts(reader: Any, has_importance: bool) -> Facts:
    architecture = _field(reader, "general.architecture")
    heads = _field(reader, f"{architecture}.attention.head_count")
    return Facts(
        num_layers=_field(reader, f"{architecture}.block_count"),
        num_experts=_field(reader, f"{architecture}.expert_count", 0),
        heads_per_kv=heads // _field(reader, f"{architecture}.attention.head_count_kv", heads),
        has_importance=has_importance,
    )


def _copy_facts(reader: Any, writer: Any) -> None:
    """Everything that the file says besides tensors: shape, tokenizer, chat template."""
    import gguf

    written = ("general.architecture", "general.file_type", "general.quantization_version")
    for field in reader.fields.values():
        if field.name in written or field.name.startswith("GGUF."):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)


def _quantized(
    tensor: Any, shape: tuple[int, ...], kind: Any, importance: npt.NDArray[np.float32] | None, pool: ThreadPoolExecutor
) -> npt.NDArray[np.uint8]:
    """A tensor's quantized rows, as bytes."""
    import gguf

    columns, rows_each = shape[-1], shape[-2]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    out = np.empty((len(rows), columns // block * size), np.uint8)
    functions = library().functions

    def work(start: int) -> bool:
        end = min(start + step, (start // rows_each + 1) * rows_each)  # never across two experts
        values = _as_float(rows[start:end], tensor.tensor_type)
        if not np.isfinite(values).all():
            return False
        weight = None
        if importance is not None:
            weight = np.ascontiguousarray(importance.reshape(-1, columns)[start // rows_each], np.float32)
        pointer = weight.ctypes.data if weight is not None and weight.any() else None
        target = out[start:end]
        functions.ggml_quantize_chunk(
            int(kind), values.ctypes.data, target.ctypes.data, 0, end - start, columns, pointer
        )
        return bool(functions.ggml_validate_row_data(int(kind), target.ctypes.data, target.nbytes))

    step = max(1, SLAB_BYTES // (4 * columns))
    starts = [first + offset for first in range(0, len(rows), rows_each) for offset in range(0, rows_each, step)]
    if not all(pool.map(work, starts)):
        raise ArtifactError(f"{tensor.name} holds values that {kind.name} cannot: infinite or not a number")
    return out.reshape(*shape[:-1], -1)


def _as_float(rows: npt.NDArray[Any], kind: Any) -> npt.NDArray[np.float32]:
    """Rows in fp32. gguf gives bf16 as bytes."""
    if kind.name == "BF16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(rows, np.float32)


def main() -> None:
    """Do the job that a file describes."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    importance = dict(np.load(job["importance"])) if job["importance"] else {}
    quantize(Path(job["source"]), Path(job["out"]), job["quantization"], job["threads"], job["overrides"], importance)


if __name__ == "__main__":
    main()
