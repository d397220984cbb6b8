"""How many directions of a matrix a training has changed: rank(W_after - W_before), after each cycle of ReLoRA."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from hpc.reuse.stored import StoredModel
from hpc.run.directory import RunDirectory
from hpc.stages.model_folder import export_stage

ATTENTION, EXPERTS = "model.layers.{layer}.self_attn.q_proj.weight", "model.layers.{layer}.mlp.experts.w2"


def update_rank(before: Tensor, after: Tensor, roundings: int = 1) -> int:
    """The numerical rank of after - before: singular values above all that rounding can make of equal weights.

    roundings: how often an update was added to the weights in their precision. Each moves an element by at most half
    an ulp, so all of them together the matrix by at most roundings x eps / 2 x |after| (Frobenius); twice that counts.
    """
    noise = roundings * torch.finfo(after.dtype).eps * float(torch.linalg.matrix_norm(after.double()))
    return int((torch.linalg.svdvals(after.double() - before.double()) > noise).sum())


def ranks_of(before: Path, after: Path, roundings: int, layer: int, expert: int) -> tuple[int, int]:
    """Rank of what was added to a layer's query matrix, and to the down projection of one of its experts. Folders of
    transformers' models."""
    first, last = StoredModel(before), StoredModel(after)
    name, experts = ATTENTION.format(layer=layer), EXPERTS.format(layer=layer)
    return (
        update_rank(first.tensor(name), last.tensor(name), roundings),
        update_rank(first.tensor(experts)[expert], last.tensor(experts)[expert], roundings),
    )


def growth(
    run: RunDirectory, before: str, stage: str, cycles: Iterable[int], layer: int, expert: int
) -> list[tuple[int, int]]:
    """`ranks_of` a relora stage after the steps at which its cycles ended, from its kept checkpoints."""
    found = []
    for cycle, step in enumerate(cycles, 1):
        with tempfile.TemporaryDirectory(dir=run.root) as scratch:
            folder = Path(scratch) / "model"
            export_stage(run, stage, folder, step)
            found.append(ranks_of(run.stage(before).artifact, folder, cycle, layer, expert))
    return found
