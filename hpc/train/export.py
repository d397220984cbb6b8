"""A checkpoint of any layout as a plain transformers model: no process group, no DeepSpeed, no GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from hpc.errors import ArtifactError
from hpc.model.build import save_model
from hpc.model.routing import router_biases
from hpc.train.checkpoint import damage
from hpc.train.fragments import WEIGHT, Fragment, Rename, read_fragments


def export_checkpoint(
    folder: Path,
    model: nn.Module,
    config: Any,
    out: Path,
    finish: Callable[[nn.Module], None] | None = None,
    rename: Rename = str,
) -> dict[str, Any]:
    """Write the weights of a checkpoint, in fp32, as a transformers folder; returns its census.

    model: what was trained, to be filled, and `config` its transformers configuration; finish: called on the filled
    model; rename: from a parameter's name to that in the file, None for one that has no place there. Every element is
    read from the fragments, whichever ranks wrote them, and every expert is compared with the written file. Raises
    ArtifactError when the checkpoint is damaged, of another model, or deleted meanwhile.
    """
    if problem := damage(folder):
        raise ArtifactError(f"checkpoint {folder} cannot be exported: {problem}")
    fragments = [
        Fragment(name, tuple(parameter.shape), 0, {WEIGHT: parameter.data.view(-1)})
        for name, parameter in model.named_parameters()
    ]
    fragments += [Fragment(name, tuple(b.shape), 0, {WEIGHT: b}) for name, b in router_biases(model).items()]
    try:
        read_fragments(folder, fragments)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"checkpoint {folder} was deleted while it was read ({error}): training goes on; export another step"
        ) from None
    if finish:
        finish(model)
    state = {known_as: value for name, value in model.state_dict().items() if (known_as := rename(name)) is not None}
    return save_model(config, state, out)
