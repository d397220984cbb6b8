"""A .gguf file as a transformers folder: llama.cpp's format, for dense models that transformers converts rightly.

transformers turns GGUF files of mixtures of experts into models with random experts, or refuses them; so only dense
architectures are taken, and every tensor is compared with the file: as many elements, and the same sum of magnitudes
(rows of queries and keys are reordered on the way, which a sum does not see).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hpc.errors import ArtifactError, DataError

DENSE = ("llama", "qwen2", "qwen3", "mistral")
TOLERANCE = 1e-5


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF file's model, in fp32, with its tokenizer and chat template. Raises DataError or ArtifactError."""
    reader = _reader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    experts = reader.fields.get(f"{architecture}.expert_count")
    if architecture not in DENSE or (experts is not None and experts.contents()):
        raise DataError(f"{path} holds a {architecture} model; GGUF files are taken of dense {', '.join(DENSE)} only")
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    _compare(path, reader, model)
    config = AutoConfig.for_model(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _reader(path: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable GGUF file ({error}): fetch it again") from None


def _compare(path: Path, reader: Any, model: Any) -> None:
    """Magnitudes of the file's tensors against the model's, matched by size and sum. Raises ArtifactError."""
    held = sorted(_magnitudes(reader))
    taken = sorted(_measure(tensor.detach().double().numpy()) for tensor in model.parameters())
    if len(held) != len(taken):
        raise ArtifactError(f"{path} holds {len(held)} tensors, {len(taken)} were taken: transformers misreads it")
    for (size, magnitude), (size_taken, magnitude_taken) in zip(held, taken, strict=True):
        if size != size_taken or abs(magnitude - magnitude_taken) > TOLERANCE * magnitude:
            raise ArtifactError(f"{path}: a tensor of {size:,} elements did not arrive: transformers misreads the file")


def _magnitudes(reader: Any) -> Iterator[tuple[int, float]]:
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        if not tensor.name.endswith("rope_freqs.weight"):
            yield _measure(dequantize(tensor.data, tensor.tensor_type).astype(np.float64))


def _measure(values: "np.ndarray[Any, np.dtype[np.float64]]") -> tuple[int, float]:
    return values.size, float(np.abs(values).sum())
