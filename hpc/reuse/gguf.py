"""A .gguf file as a transformers folder: llama.cpp's format, for dense models that transformers converts rightly.

transformers turns GGUF files of mixtures of experts into models with random experts, or refuses them; so only dense
architectures are taken, and every tensor is compared with that of its name in the file, value by value (rows of queries
and keys are reordered on the way: of those, sums that do not depend on the order).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

from hpc.errors import ArtifactError, DataError
from hpc.runtimes.remote import Remote
from hpc.runtimes.tokens import PROBES, check_tokens

DENSE = ("llama", "qwen2", "qwen3", "mistral")
TOLERANCE = 1e-5


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF file's model, in fp32, with its tokenizer and chat template. Raises DataError or ArtifactError."""
    reader = _reader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    experts = reader.fields.get(f"{architecture}.expert_count")
    if architecture not in DENSE or (experts is not None and experts.contents()):
        raise DataError(f"{path} holds a {architecture} model; GGUF files are taken of dense {', '.join(DENSE)} only")
    _have_gguf_found()
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    _compare(path, reader, model)
    config = AutoConfig.for_model(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _cut_words_as(reader, folder / "tokenizer.json")
    with Remote(path, context_length=16) as original:
        check_tokens(original, folder, PROBES)


def _have_gguf_found() -> None:
    """transformers asks for gguf 0.10; the newer one of llama.cpp's converter goes by the converter's, 0.1.1."""
    asked: Any = modeling_gguf_pytorch_utils
    asked.is_gguf_available = lambda *_: True


DIGITS_ALONE = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
PRE_TOKENIZERS = {"smollm": DIGITS_ALONE}
"""llama.cpp's name of a rule that cuts a text into words before BPE -> the rule, where transformers forgets it."""


def _cut_words_as(reader: Any, tokenizer: Path) -> None:
    """Give a tokenizer the pre-tokenizer that its .gguf file names."""
    field = reader.fields.get("tokenizer.ggml.pre")
    rule = PRE_TOKENIZERS.get(str(field.contents())) if field is not None else None
    if rule is not None:
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        tokenizer.write_text(json.dumps({**content, "pre_tokenizer": rule}, ensure_ascii=False), encoding="utf-8")


def _reader(path: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable GGUF file ({error}): fetch it again") from None


PARTS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""A layer's tensors: llama.cpp's name -> transformers'."""
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
REORDERED = (".q_proj.", ".k_proj.")
"""llama.cpp keeps the rows of these in another order, for its rotary embedding."""


def name_of(tensor: str) -> str:
    """transformers' name of a GGUF tensor; KeyError for one that is not known."""
    stem, end = tensor.rsplit(".", 1)
    if not stem.startswith("blk."):
        return f"{ENDS[stem]}.{end}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{end}"


def _compare(path: Path, reader: Any, model: Any) -> None:
    """Every tensor of the file against the model's, by name and value. Raises ArtifactError.

    Of reordered rows, the sums over rows of their magnitudes.
    """
    left = {name: tensor.detach().float().numpy() for name, tensor in model.named_parameters()}
    for name, values in _tensors(path, reader):
        taken = left.pop(name, None)
        if taken is None or taken.shape != values.shape:
            found = "nothing" if taken is None else f"one of {taken.shape}"
            raise ArtifactError(f"{path}: {name} of {values.shape} became {found}: transformers misreads the file")
        if any(part in name for part in REORDERED):
            values, taken = (np.abs(one).sum(0, dtype=np.float64) for one in (values, taken))
        if not np.allclose(values, taken, rtol=TOLERANCE, atol=1e-7):
            raise ArtifactError(f"{path}: {name} did not arrive as the file has it: transformers misreads the file")
    if left:
        raise ArtifactError(f"{path} holds no {next(iter(left))}, which the model has: it would stay random")


def _tensors(path: Path, reader: Any) -> Iterator[tuple[str, "np.ndarray[Any, np.dtype[Any]]"]]:
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        if tensor.name.endswith("rope_freqs.weight"):
            continue
        try:
            yield name_of(tensor.name), dequantize(tensor.data, tensor.tensor_type)
        except KeyError:
            raise ArtifactError(f"{path} holds {tensor.name}, which has no place in a dense model") from None
