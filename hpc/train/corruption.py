"""A search for silent corruption: ranks that must agree in every bit are asked whether they do.

A core or an accelerator that computes wrongly, or a bit that flips in memory, raises no error. Data-parallel ranks hold
copies of the same weights, so now and then all of them compute the same micro-batch, and compare sums over the bits of
the loss, of the logits, and of every weight that they share. One flipped bit changes a sum. The ranks that differ from
the majority are named with their nodes.

What it sees: wrong arithmetic in a forward pass, flipped bits in shared weights. What it does not: with expert
parallelism, experts that one rank alone holds (with several groups their copies are compared); with ZeRO 3, weights, of
which no rank holds a copy; moments of the optimizer, which no two ranks share.
"""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from hpc.errors import StageError
from hpc.evaluate.loss import token_losses
from hpc.model.packing import packed_matrices
from hpc.train.engine import Engine

NOBODY = torch.iinfo(torch.int64).min
"""In place of a sum that a rank has no part in."""
NUM_COMPUTED = 2
"""The last entries are of loss and logits; those before are of weights."""


def search(engine: Engine, batch: Tensor, step: int, nodes: list[str]) -> None:
    """Compare what this rank computes and holds with the other ranks. Collective.

    batch: token ids (B, S + 1) of this rank; rank 0's are taken. nodes: node of every rank.
    Raises StageError, on all ranks, that names those in the minority. Where the arithmetic cannot be compared, because
    most ranks do not even repeat their own results or all of many ranks differ, it says so and goes on.
    """
    names, sums = fingerprint(engine, batch)
    bounds = torch.stack([sums, torch.where(sums == NOBODY, sums, -sums)])
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    differing = (bounds[0] != -bounds[1]).nonzero().flatten().tolist()
    if not differing:
        return
    again = fingerprint(engine, batch)[1]
    every = [torch.empty_like(sums.repeat(2, 1)) for _ in nodes]
    dist.all_gather(every, torch.stack([sums, again]))
    first = differing[0]
    found = {rank: int(theirs[0, first]) for rank, theirs in enumerate(every) if int(theirs[0, first]) != NOBODY}
    unsteady = sum(not torch.equal(theirs[0], theirs[1]) for theirs in every)
    is_arithmetic = first >= len(names) - NUM_COMPUTED
    if is_arithmetic and (2 * unsteady > len(nodes) or (len(nodes) > 2 and not minority(found))):
        if dist.get_rank() == 0:
            print(f"step {step}: {names[first]} cannot be compared between ranks on this hardware", flush=True)
        return
    raise StageError(
        f"silent corruption at step {step}: {verdict(names[first], found, nodes)} (values that differ: "
        f"{len(differing)}); test the node, keep jobs off it (sbatch --exclude), and go on from the newest checkpoint"
    )


def minority(values: dict[int, int]) -> list[int]:
    """The ranks that differ from more than half of all; empty when no more than half agree."""
    common, count = Counter(values.values()).most_common(1)[0]
    return [rank for rank, value in values.items() if value != common] if 2 * count > len(values) else []


def verdict(name: str, values: dict[int, int], nodes: list[str]) -> str:
    """Who is wrong about a value."""
    accused = minority(values)
    told = ", ".join(f"rank {rank} on {nodes[rank]}" for rank in accused or values)
    if accused:
        return f"{told} differs in {name} from the {len(values) - len(accused)} others"
    return f"{told} differ in {name}, and no majority tells who is wrong"


def fingerprint(engine: Engine, batch: Tensor) -> tuple[list[str], Tensor]:
    """Names and sums over bits (int64) of everything that ranks share. Collective; no gradient, no random number."""
    with torch.no_grad():
        batch = batch.to(engine.device)
        dist.broadcast(batch, src=0)
        engine.module.eval()
        logits = engine.forward(batch[:, :-1])
        engine.module.train()
        entries = _weights(engine)
        entries += [("the loss", bit_sum(token_losses(logits, batch[:, 1:]))), ("the logits", bit_sum(logits))]
        nobody = torch.tensor(NOBODY, device=engine.device)
        return [name for name, _ in entries], torch.stack([nobody if value is None else value for _, value in entries])


def _weights(engine: Engine) -> list[tuple[str, Tensor | None]]:
    """One entry for each shared weight; for each expert-parallel rank one of its experts' weights."""
    if engine.settings.parallel.zero_stage == 3:
        return []
    sums = {name: bit_sum(parameter) for name, parameter in engine.module.named_parameters()}
    for packed in packed_matrices(engine.module):  # experts of one parameter together
        bits = torch.stack([bit_sum(tensor) for tensor in packed.matrix.tensors]).sum()
        sums[packed.name] = sums[packed.name] + bits if packed.name in sums else bits
    entries: list[tuple[str, Tensor | None]] = []
    place = engine.place
    for name, value in sums.items():
        if place.is_split(name):
            entries += [(f"{name} ({rank})", value if rank == place.rank else None) for rank in range(place.size)]
        else:
            entries.append((name, value))
    return entries


def bit_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's elements read as integers, modulo 2^64: another one after any flipped bit."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(width).sum(dtype=torch.int64)
