"""A checkpoint of any layout as a plain transformers model: no process group, no DeepSpeed, no GPU."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hpc.errors import ArtifactError
from hpc.model.build import build_model, save_model
from hpc.model.routing import router_biases
from hpc.train.checkpoint import damage
from hpc.train.fragments import WEIGHT, Fragment, read_fragments


def export_checkpoint(folder: Path, config: Any, out: Path) -> dict[str, Any]:
    """Write the weights of a checkpoint, in fp32, as a transformers folder; returns its census.

    `config` is the transformers configuration of what was trained. Every element is read from the fragments, whichever
    ranks wrote them, and every expert is compared with the written file. Raises ArtifactError when the checkpoint is
    damaged, of another model, or deleted meanwhile.
    """
    if problem := damage(folder):
        raise ArtifactError(f"checkpoint {folder} cannot be exported: {problem}")
    model = build_model(config, seed=0)
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
    return save_model(config, dict(model.state_dict()), out)
