"""Our models as .gguf files, for llama.cpp and what is built on it.

llama.cpp's converter and ggml's quantizer run in processes of their own: they change global state of libraries, and an
assertion in C++ ends the process it happens in. Here it becomes one line.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc.errors import ArtifactError, ConfigError, StorageError
from hpc.model.build import FEED_FORWARD, load_config
from hpc.runtimes.child import end_with_parent, environment
from hpc.shrink.gguf_mix import BLOCKS, FILE_TYPES, is_quantizable

GGUF_TYPES = {name: number for name, (_, number) in FILE_TYPES.items()}
"""What `export` may be asked for -> llama.cpp's number of the file type (enum llama_ftype)."""
ARCHITECTURES = (
    "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3",
)  # fmt: skip
"""transformers' model types whose files were run against transformers, logit by logit."""
BUILT_IN: dict[str, dict[str, Any]] = {
    "olmoe": {"norm_topk_prob": False, "rms_norm_eps": 1e-5, "clip_qkv": None},
    "qwen2_moe": {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_moe": {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "deepseek_v3": {"rope_interleave": True},
}
"""Settings that llama.cpp's code, or its converter, fixes for an architecture: with other ones the file would load, and
answer a little worse."""


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why llama.cpp cannot run a model, in words; None where it can. config: all of transformers' settings of it."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        return f"it is a {kind} model; exported are {', '.join(ARCHITECTURES)}"
    if config.get("quantization_config"):
        return "its weights are quantized already: export the model it was made from"
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if kind == "olmoe" and kv_heads not in (None, heads):
        return (
            f"llama.cpp takes an olmoe with as many key and value heads as attention heads, this has {kv_heads} for "
            f"{heads}: train one with {heads}, or a qwen3_moe"
        )
    for setting, value in {"hidden_act": "silu", **BUILT_IN.get(kind, {})}.items():
        if config.get(setting, value) != value:
            return (
                f"llama.cpp runs a {kind} with {setting} {value} only, this has {config[setting]}: train a qwen3_moe "
                "or a mixtral"
            )
    window, positions = config.get("sliding_window"), config.get("max_position_embeddings") or 0
    if window and positions > window and config.get("use_sliding_window", True):
        return (
            f"its attention looks back {window} tokens of {positions}, and llama.cpp's looks back on all for a {kind}: "
            f"set max_position_embeddings to {window} in its config.json"
        )
    return None


def convert(source: Path, out: Path, width: str | None = None) -> None:
    """Write the transformers folder `source` unquantized as the .gguf file `out`, tokenizer and chat template included.

    width: f32, f16 or bf16; by default that of the folder's own weights, f32 or bf16. Raises ConfigError for a model
    that llama.cpp cannot run, ArtifactError when the converter fails, StorageError when the disk is full.
    """
    config = load_config(source).to_dict()
    reason = refusal(config)
    if reason:
        raise ConfigError(f"{source.name} cannot become a .gguf file: {reason}")
    _run(
        "llama.cpp's converter", "hpc.shrink.gguf_convert", source, out,
        width or ("bf16" if "bfloat16" in str(config.get("dtype")) else "f32"),
    )  # fmt: skip


def quantize(
    plain: Path, out: Path, quantization: str, scratch: Path, *, overrides: Mapping[str, str] | None = None,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> None:  # fmt: skip
    """Quantize an unquantized .gguf file into `out`.

    quantization: a name in GGUF_TYPES. scratch: a folder for notes. overrides: regular expression over tensor names ->
    ggml type, which replaces that of the mix. importance: see hpc.shrink.importance. Raises ConfigError for a type that
    is none, ArtifactError when ggml fails, StorageError when the disk is full.
    """
    for kind in (overrides or {}).values():
        if kind not in BLOCKS:
            raise ConfigError(f"{kind!r} is no type of a tensor: choose one of {', '.join(BLOCKS)}")
    if importance:
        with (scratch / "importance.npz").open("wb") as file:
            np.savez(file, **importance)  # type: ignore[arg-type]  # names of tensors are no option of savez
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    job = {
        "source": str(plain), "out": str(out), "quantization": quantization, "threads": cores,
        "overrides": dict(overrides or {}), "importance": str(scratch / "importance.npz") if importance else None,
    }  # fmt: skip
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    _run("llama.cpp's quantizer", "hpc.shrink.gguf_quantize", scratch / "job.json")


def _run(what: str, module: str, *arguments: object) -> None:
    """A module as a program that ends with this one. Raises ArtifactError with the last line it wrote."""
    result = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True, text=True, env=environment(), preexec_fn=end_with_parent,
    )  # fmt: skip
    if result.returncode == 0:
        return
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()] or ["it says nothing"]
    if "No space left" in lines[-1]:
        raise StorageError(f"{what}: {lines[-1]}: free some space")
    how = f"was ended by {signal.Signals(-result.returncode).name}" if result.returncode < 0 else "failed"
    raise ArtifactError(f"{what} {how}: {lines[-1]}")


def census(file: Path) -> dict[str, Any]:
    """What a .gguf file holds, by group: tensors, parameters, bytes, bits per weight, how many tensors of each type.

    `smaller_blocks` counts matrices whose rows do not divide into the 256 weights that the file's type wants, and which
    llama.cpp therefore keeps in another one; of experts, `tensor_types` has the type of every tensor. Raises
    ArtifactError for a file that cannot be read.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(str(file))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} is not a readable GGUF file ({error}): export it again") from None
    number = reader.get_field("general.file_type")
    main = next((kind for kind, mix in FILE_TYPES.values() if number and mix == number.contents()), "F32")
    groups: dict[str, Any] = {}
    for tensor in reader.tensors:
        name, shape = tensor.name, tuple(int(size) for size in reversed(tensor.shape))
        kind = tensor.tensor_type.name
        empty = {"tensors": 0, "parameters": 0, "bytes": 0, "types": {}, "smaller_blocks": 0}
        entry = groups.setdefault(group_of(name), empty)
        entry["tensors"] += 1
        entry["parameters"] += int(tensor.n_elements)
        entry["bytes"] += int(tensor.n_bytes)
        entry["types"][kind] = entry["types"].get(kind, 0) + 1
        entry["smaller_blocks"] += is_quantizable(name, shape) and shape[-1] % BLOCKS[main] != 0
        if ".ffn_" in name and "_exps." in name:
            entry.setdefault("tensor_types", {})[name] = kind
    for entry in groups.values():
        entry["bits_per_weight"] = 8 * entry["bytes"] / entry["parameters"]
    return groups


def group_of(name: str) -> str:
    """Which part of the model a tensor of a .gguf file belongs to, in the words of `hpc.model.build.tensor_group`."""
    if "_exps." in name:
        return "experts"
    if "norm" in name:
        return "norms"
    if "ffn_gate_inp." in name or "exp_probs_b" in name:
        return "router"
    if ".ffn_" in name:
        return FEED_FORWARD
    return "attention" if ".attn_" in name else "embedding and head"
