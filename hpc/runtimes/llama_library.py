"""llama.cpp's C functions, as the package xllamacpp brings them: the door to that library.

The wheel carries the whole of llama.cpp without a compiler or a CUDA toolkit, for Linux, macOS (Metal) and Windows.
Its Python side is a server; its shared library exports the C interface, which is what is bound here. Structures are
those of llama.h of exactly VERSION: another version is refused, and so is one whose default values do not lie where
they should. What would have been needed and is not exported: llama_model_quantize (see hpc/shrink/gguf_quantize.py).
"""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hpc.errors import ConfigError

VERSION = "2026.10.11549"
"""Of xllamacpp; its last number is llama.cpp's build."""


class ModelParams(ctypes.Structure):
    """struct llama_model_params."""

    _fields_ = [
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32), ("split_mode", c_int32),
        ("load_mode", c_int32), ("lazy_mode", c_int32), ("main_gpu", c_int32), ("tensor_split", c_void_p),
        ("progress_callback", c_void_p), ("progress_callback_user_data", c_void_p), ("kv_overrides", c_void_p),
        ("vocab_only", c_bool), ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool),
        ("no_alloc", c_bool), ("load_mtp", c_bool),
    ]  # fmt: skip


class ContextParams(ctypes.Structure):
    """struct llama_context_params."""

    _fields_ = [
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32), ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int32), ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32), ("attention_type", c_int32), ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float), ("rope_freq_scale", c_float), ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float), ("yarn_beta_fast", c_float), ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32), ("defrag_thold", c_float), ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32), ("type_v", c_int32), ("moe_cache_size", c_size_t), ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p), ("embeddings", c_bool), ("offload_kqv", c_bool), ("no_perf", c_bool),
        ("op_offload", c_bool), ("swa_full", c_bool), ("kv_unified", c_bool), ("samplers", c_void_p),
        ("n_samplers", c_size_t), ("ctx_other", c_void_p),
    ]  # fmt: skip


class Batch(ctypes.Structure):
    """struct llama_batch: ids of some positions of one or several sequences."""

    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
ERROR_LEVEL = 4
"""ggml_log_level of messages that say why something failed."""

MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_outputs_max_per_seq": 1, "rope_scaling_type": -1,
    "flash_attn_type": -1, "yarn_ext_factor": -1.0, "yarn_beta_slow": -1.0, "defrag_thold": -1.0, "type_k": 1,
    "type_v": 1, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True, "n_samplers": 0,
    "ctx_other": None,
}  # fmt: skip
"""Values that llama.cpp's own default structures hold, in fields from the first to the last."""

SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_size": (c_uint64, [c_void_p]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "ggml_quantize_chunk": (c_size_t, [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_validate_row_data": (c_bool, [c_int32, c_void_p, c_size_t]),
}


class Library:
    """llama.cpp, loaded once in a process, silent; `functions` has the bound C functions."""

    def __init__(self) -> None:
        import xllamacpp.xllamacpp as module

        found = version("xllamacpp")
        if found.split("+")[0] != VERSION:  # builds for other devices carry a local version, the same source
            raise ConfigError(f"xllamacpp {found} is installed, {VERSION} is bound: pip install xllamacpp=={VERSION}")
        self.functions: Any = ctypes.CDLL(str(Path(module.__file__)))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.functions, name)
            function.restype, function.argtypes = result, arguments
        for defaults, wanted in (
            (self.functions.llama_model_default_params(), MODEL_DEFAULTS),
            (self.functions.llama_context_default_params(), CONTEXT_DEFAULTS),
        ):
            for field, value in wanted.items():
                if getattr(defaults, field) != value:
                    raise ConfigError(
                        f"xllamacpp {found} has {field} = {getattr(defaults, field)} where {value} is the default: it "
                        f"is not the build that is bound; pip install --force-reinstall xllamacpp=={VERSION}"
                    )
        self.last_error = ""
        self._callback = LogCallback(self._log)  # kept: llama.cpp holds only its address
        self.functions.llama_log_set(self._callback, None)
        self.functions.llama_backend_init()

    def _log(self, level: int, text: bytes, _: Any) -> None:
        if level == ERROR_LEVEL and text.strip():
            self.last_error = text.decode("utf-8", "replace").strip().split(": ", 1)[-1]


@lru_cache(maxsize=1)
def library() -> Library:
    """The loaded library. Raises ConfigError when it is absent or another than the one bound."""
    try:
        return Library()
    except ImportError as error:
        raise ConfigError(
            f"llama.cpp is not installed ({error}), a .gguf file needs it: pip install xllamacpp=={VERSION}"
        ) from None
