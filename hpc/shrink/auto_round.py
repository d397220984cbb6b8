"""The door to auto-round: linear layers and experts quantized into the compressed-tensors format, layer by layer.

`python -m hpc.shrink.auto_round REQUEST.json`, started by hpc/shrink/library.py: the library replaces classes of
transformers for as long as its process lives, and what it allocates goes back to the system when that ends.

Round-to-nearest goes tensor by tensor from disk. SignRound (arXiv:2309.05516) holds one layer, its calibration
activations and the rounding that it learns. transformers and vLLM read the format. Embedding, head, norms and router
keep their precision. What the library writes is not believed: the artifact is read back by others.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hpc.errors import ArtifactError
from hpc.runtimes.serve import peak_memory_bytes
from hpc.shrink.request import Request

SEED = 1
"""Of the order in which SignRound takes windows."""


def quantize(request: Request) -> None:
    """Write the quantized model into `request.target`. Raises ArtifactError when the library leaves no model behind."""
    from auto_round import AutoRound

    torch.manual_seed(SEED)
    _read_mixtral()
    _keep_nearest(set(request.nearest))
    scratch = Path(request.scratch)
    common: dict[str, Any] = {
        "scheme": _scheme(request), "layer_config": {name: {"bits": bits} for name, bits in request.bits_of.items()},
        "device_map": "cpu", "seed": SEED, "enable_torch_compile": False,
    }  # fmt: skip
    if request.ids is None:
        rounding = AutoRound(request.source, iters=0, disable_opt_rtn=True, **common)
    else:
        windows = [torch.from_numpy(row)[None] for row in np.load(request.ids)]
        rounding = AutoRound(
            request.source, iters=request.iterations, dataset=windows, nsamples=len(windows),
            seqlen=windows[0].shape[-1], batch_size=min(request.batch_size, len(windows)), amp=False,
            low_cpu_mem_usage=True, **common,
        )  # fmt: skip
    rounding.quantize_and_save(output_dir=str(scratch), format="llm_compressor")
    written = [path.parent for path in scratch.rglob("config.json")]
    if len(written) != 1:
        raise ArtifactError(f"auto-round wrote {len(written)} models into {scratch} where one was expected")
    target = Path(request.target)
    written[0].rename(target)
    _name_as_mixtral(target)
    _group_experts(target)
    for path in target.iterdir():
        path.chmod(0o644)


def _scheme(request: Request) -> dict[str, Any]:
    """What auto-round calls a scheme. E4M3 weights have one scale a row, activations one a token."""
    if request.format == "fp8":
        return {
            "bits": 8, "group_size": -1, "data_type": "fp", "sym": True,
            "act_bits": 8, "act_group_size": -1, "act_data_type": "fp", "act_sym": True, "act_dynamic": True,
        }  # fmt: skip
    return {
        "bits": request.bits, "group_size": request.group_size, "data_type": "int", "sym": request.symmetric,
        "act_bits": 16,
    }  # fmt: skip


def _keep_nearest(names: set[str]) -> None:
    """Have SignRound leave the matrices `names` rounded to nearest: their rounding and ranges get no gradient."""
    from auto_round.wrapper import WrapperLinear

    made = WrapperLinear._init_params

    def init_params(self: Any, name: str, dtype: Any, shape: Any, value: float, tunable: bool) -> None:
        made(self, name, dtype, shape, value, tunable)
        if tunable and self.orig_layer.global_name.replace(".block_sparse_moe.", ".mlp.") in names:
            getattr(self, name).register_hook(torch.zeros_like)

    if names:
        WrapperLinear._init_params = init_params


def _read_mixtral() -> None:
    """Let auto-round find Mixtral's experts while it reads a model layer by layer.

    It renames either the module (`block_sparse_moe`) or the matrix (`w1`), and Mixtral's files rename both.
    """
    from auto_round.utils import disk_stream_util as streaming

    known = streaming._renamed_expert_candidates

    def candidates(index: Any, name: str) -> Iterator[str]:
        for candidate in known(index, name):
            yield candidate
            yield candidate.replace(".mlp.experts.", ".block_sparse_moe.experts.")

    streaming._renamed_expert_candidates = candidates


def _name_as_mixtral(folder: Path) -> None:
    """Give Mixtral's quantized experts the names transformers and vLLM read; auto-round's loader does not find them."""
    matrices = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    pattern = re.compile(r"(?<=\.block_sparse_moe\.experts\.)(\d+)\.(gate_proj|down_proj|up_proj)(?=\.)")

    def renamed(name: str) -> str:
        return pattern.sub(lambda found: f"{found[1]}.{matrices[found[2]]}", name)

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if any(renamed(name) != name for name in tensors):
            save_file({renamed(name): tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(renamed(index.read_text()))


def _group_experts(folder: Path) -> None:
    """Where matrices have different bits, point out the group of the experts: transformers reads all experts of a model
    by the one group that says `experts` in a pattern (transformers 5.23, integrations/compressed_tensors.py)."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    groups = content.get("quantization_config", {}).get("config_groups", {})
    found = [group for group in groups.values() if any(".experts." in name for name in group["targets"])]
    if len(found) > 1:
        raise ArtifactError(f"experts in {len(found)} formats, and transformers reads one: the artifact is refused")
    if found:
        dense = [name for name in found[0]["targets"] if ".experts." not in name]
        found[0]["targets"] = [r"re:.*\.experts\..*", *dense]
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Do what the request asks; the last line of standard output is the peak of resident memory, bytes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints goes where its progress goes
    os.environ["AR_DISK_STREAM_MODEL"] = "1"  # dense layers too are read when their turn comes
    request = Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    quantize(request)
    print(peak_memory_bytes(), file=answers, flush=True)


if __name__ == "__main__":
    main()
