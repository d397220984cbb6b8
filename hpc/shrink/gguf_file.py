"""What a .gguf file holds, read with the library that belongs to llama.cpp's converter."""

from collections.abc import Iterator
from pathlib import Path

from gguf import GGUFReader
from gguf.quants import dequantize

from hpc.errors import ArtifactError
from hpc.shrink.matrices import Named


def context_length(file: Path) -> int:
    """Positions that the model of a file was made for."""
    reader = GGUFReader(str(file))
    architecture, length = reader.get_field("general.architecture"), None
    if architecture is not None:
        length = reader.get_field(f"{architecture.contents()}.context_length")
    if length is None:
        raise ArtifactError(f"{file} does not say for how many positions its model was made: export it again")
    return int(length.contents())


def matrices(file: Path) -> Iterator[Named]:
    """Every tensor in float32, dequantized, an expert's by itself: `blk.0.ffn_gate_exps.3.weight`. In the file's order;
    one expert's matrix is in memory at a time."""
    for tensor in GGUFReader(str(file)).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if "_exps." not in tensor.name:
            yield tensor.name, dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            continue
        name, part = tensor.name.rsplit(".", 1)
        for expert, data in enumerate(tensor.data.reshape(shape[0], *tensor.data.shape[1:])):
            yield f"{name}.{expert}.{part}", dequantize(data, tensor.tensor_type).reshape(shape[1:])
