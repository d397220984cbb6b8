"""The training state as fragments that belong to no layout: written by all ranks, read at any world, EP and ZeRO.

Each rank owns a contiguous range of each parameter: of its fp32 values and of each optimizer moment. A fragment is such
a range under the parameter's logical name and position; ranks write theirs side by side, without a collective:

    fragments-00002.safetensors     keys `VALUE|NAME|START`: VALUE is weight, exp_avg or exp_avg_sq
    state.json                      optimizer step, shape of every parameter

Logical names are those of expert parallelism: an expert's gate, up and down matrices are w1, w3 and w2 of (E, I, H),
(E, I, H) and (E, H, I) with all experts. transformers' gate_up_proj (E, 2I, H) is cut into them, expert by expert.
"""

import bisect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from hpc.errors import ArtifactError
from hpc.run.directory import write_json
from hpc.train.written import Written, save_tensors

STATE = "state.json"
WEIGHT = "weight"


@dataclass(frozen=True)
class Fragment:
    """A range of one parameter that this rank owns."""

    name: str
    """Of the parameter, as this layout names it."""
    shape: tuple[int, ...]
    """Of the whole parameter: all experts, all ranks."""
    start: int
    """First element, in the flattened whole parameter."""
    values: Mapping[str, Tensor]
    """weight and optimizer moments, each a flat view (N) of what the optimizer works on."""

    @property
    def size(self) -> int:
        """Elements."""
        return self.values[WEIGHT].numel()


LOGICAL = (
    (".mlp.router.gate.", ".mlp.gate."),
    (".experts.down_proj", ".experts.w2"),
    (".mlp.shared_expert.", ".mlp.shared_experts."),  # Qwen2-MoE has one, and AutoEP's name for it is DeepSeek's
    (".mlp.shared_expert_gate.", ".mlp.shared_experts_gate."),
)


def logical_name(name: str) -> str:
    """The name of a parameter that does not depend on the layout."""
    for theirs, ours in LOGICAL:
        name = name.replace(theirs, ours)
    return name


def logical_ranges(name: str, shape: tuple[int, ...], start: int, size: int) -> Iterator[tuple[str, int, int, int]]:
    """(logical name, logical start, offset in the fragment, elements) of a range of a parameter.

    Every range of a parameter is one range of its logical one, except of fused gates and ups: there each expert's two
    matrices are ranges of their own.
    """
    if not name.endswith(".experts.gate_up_proj"):
        yield logical_name(name), start, 0, size
        return
    block = shape[1] // 2 * shape[2]
    position, end = start, start + size
    while position < end:
        number, inside = divmod(position, block)
        expert, half = divmod(number, 2)
        length = min(block - inside, end - position)
        matrix = name.removesuffix("gate_up_proj") + ("w3" if half else "w1")
        yield matrix, expert * block + inside, position - start, length
        position += length


def write_fragments(folder: Path, rank: int, fragments: list[Fragment], step: int) -> list[Written]:
    """Write this rank's part of a checkpoint, rank 0 also what all share; returns the files. Raises OSError."""
    tensors = {_key(fragment, value): tensor for fragment in fragments for value, tensor in fragment.values.items()}
    shapes = {fragment.name: list(fragment.shape) for fragment in fragments}
    path = folder / f"fragments-{rank:05d}.safetensors"
    files = [save_tensors(path, tensors, {"shapes": json.dumps(shapes)})]
    if rank == 0:
        write_json(folder / STATE, {"step": step})
        files.append(Written.read(folder / STATE))
    return files


def copy_fragments(fragments: list[Fragment], host: dict[str, Tensor], ready: Any = None) -> list[Fragment]:
    """The same fragments with their values copied into host memory: into the tensors of `host`, made when missing.

    `ready` is the CUDA event after which the values hold still; copies then run beside other work of the GPU.
    """
    pairs = []
    for fragment in fragments:
        for value, tensor in fragment.values.items():
            key = _key(fragment, value)
            if key not in host:
                host[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            pairs.append((host[key], tensor))
    if ready is None:
        for target, tensor in pairs:
            target.copy_(tensor)
    else:
        stream = torch.cuda.Stream(pairs[0][1].device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            for target, tensor in pairs:
                target.copy_(tensor, non_blocking=True)
            stream.synchronize()
    return [
        replace(fragment, values={value: host[_key(fragment, value)] for value in fragment.values})
        for fragment in fragments
    ]


def count_bytes(fragments: list[Fragment]) -> int:
    """Bytes that these fragments take in memory and, but for a header, on the disk."""
    return sum(tensor.nbytes for fragment in fragments for tensor in fragment.values.values())


def _key(fragment: Fragment, value: str) -> str:
    return f"{value}|{fragment.name}|{fragment.start}"


def read_fragments(folder: Path, fragments: list[Fragment]) -> int:
    """Fill this rank's fragments from a checkpoint of any layout; returns its step.

    Raises ArtifactError when an element of them is not in the checkpoint.
    """
    stored = _Stored(folder)
    for fragment in fragments:
        for value, target in fragment.values.items():
            for name, start, offset, size in logical_ranges(
                fragment.name, fragment.shape, fragment.start, fragment.size
            ):
                stored.fill(value, name, start, target[offset : offset + size])
    return int(json.loads((folder / STATE).read_text(encoding="utf-8"))["step"])


class _Stored:
    """The pieces of a checkpoint, found by value, logical name and position."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Any] = []
        self.pieces: dict[tuple[str, str], list[tuple[int, int, int, str, int]]] = {}
        for number, path in enumerate(sorted(folder.glob("fragments-*.safetensors"))):
            file: Any = safe_open(str(path), framework="pt")
            self.files.append(file)
            shapes = json.loads(file.metadata()["shapes"])
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                value, name, start = key.split("|")
                size = file.get_slice(key).get_shape()[0]
                for logical, at, offset, length in logical_ranges(name, tuple(shapes[name]), int(start), size):
                    self.pieces.setdefault((value, logical), []).append((at, length, number, key, offset))
        for pieces in self.pieces.values():
            pieces.sort()

    def fill(self, value: str, name: str, start: int, target: Tensor) -> None:
        """Copy elements start .. start + len(target) of a logical parameter into `target`."""
        pieces = self.pieces.get((value, name), [])
        position, end = start, start + target.numel()
        index = max(0, bisect.bisect_right(pieces, (position, float("inf"))) - 1)
        while position < end:
            if index >= len(pieces) or not pieces[index][0] <= position < pieces[index][0] + pieces[index][1]:
                raise ArtifactError(
                    f"{self.folder}: {value} of {name} has no element {position}: the checkpoint is of another model, "
                    "or of other optimizer settings; delete it to start the stage again"
                )
            at, length, number, key, offset = pieces[index]
            taken = min(at + length, end) - position
            first = offset + position - at
            piece = self.files[number].get_slice(key)[first : first + taken]
            target[position - start : position - start + taken].copy_(piece)
            position += taken
            index += 1


Rename = Callable[[str], str | None]
"""From a parameter's name to that in a source of weights; None for what no source has, such as new adapters."""


class Source(Protocol):
    """Weights that can be read range by range, by logical name."""

    def fill(self, name: str, start: int, target: Tensor) -> None:
        """Copy elements start .. start + len(target) of a parameter into the flat `target`. Raises ArtifactError."""
        ...


def fill_weights(source: Source, fragments: list[Fragment], rename: Rename) -> None:
    """Take the weights of fragments from elsewhere; optimizer moments stay as they are. Raises ArtifactError."""
    for fragment in fragments:
        known_as = rename(fragment.name)
        if known_as is None:
            continue
        for name, start, offset, size in logical_ranges(known_as, fragment.shape, fragment.start, fragment.size):
            source.fill(name, start, fragment.values[WEIGHT][offset : offset + size])


def frozen_fragments(module: torch.nn.Module, experts: "ExpertPlace", *, own: bool = False) -> list[Fragment]:
    """What this rank holds of parameters that are not trained: all under ZeRO 1 and 2, its part under ZeRO 3.

    own: of what several ranks hold, only this one's equal share, so that together they have everything once.
    """
    found = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            continue
        part: Any = parameter
        if not hasattr(part, "ds_tensor"):
            shape, first = experts.whole(name, tuple(parameter.shape))
            flat, low = parameter.data.view(-1), 0
            if own:
                number, replicas = experts.replica(name)
                share = -(-flat.numel() // replicas)
                low = min(flat.numel(), number * share)
                flat = flat[low : low + share]
            if len(flat):
                found.append(Fragment(name, shape, first + low, {WEIGHT: flat}))
            continue
        size = part.ds_tensor.ds_numel
        start = size * torch.distributed.get_rank(part.ds_process_group)
        owned = min(size, part.ds_numel - start)
        if owned > 0:
            shape, first = experts.whole(name, tuple(part.ds_shape))
            found.append(Fragment(name, shape, first + start, {WEIGHT: part.ds_tensor.data.narrow(0, 0, owned)}))
    return found


def zero_fragments(module: torch.nn.Module, optimizer: Any, stage: int, experts: "ExpertPlace") -> list[Fragment]:
    """What this rank owns of a model under DeepSpeed's ZeRO. Moments that do not exist yet are made, as zeros."""
    return [
        fragment
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        for fragment in (_of_stage_3 if stage == 3 else _of_stage_1_or_2)(name, parameter, optimizer, experts)
    ]


@dataclass(frozen=True)
class ExpertPlace:
    """Where this rank stands among those that share a set of experts."""

    rank: int
    size: int

    def is_split(self, name: str) -> bool:
        """Whether this rank holds only some of the experts of a parameter."""
        return self.size > 1 and ".experts." in name and ".shared_experts." not in name

    def replica(self, name: str) -> tuple[int, int]:
        """This rank's number among the ranks that hold the same of a parameter, and how many they are."""
        split = self.size if self.is_split(name) else 1
        return torch.distributed.get_rank() // split, torch.distributed.get_world_size() // split

    def whole(self, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Shape of the parameter with all experts, and where this rank's part begins in it, flattened."""
        if not self.is_split(name):
            return shape, 0
        return (shape[0] * self.size, *shape[1:]), self.rank * torch.Size(shape).numel()


def _of_stage_1_or_2(name: str, parameter: Any, optimizer: Any, experts: ExpertPlace) -> Iterator[Fragment]:
    mapping = parameter._hp_mapping
    if mapping is None:  # no part of it is in this rank's partition
        return
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    where = mapping.hp_fragment_address
    shape, first = experts.whole(name, tuple(parameter.shape))
    values = _views(optimizer, mapping.param_group_index, flat, where.start, where.numel)
    yield Fragment(name, shape, first + mapping.lp_fragment_address.start, values)


def _of_stage_3(name: str, parameter: Any, optimizer: Any, experts: ExpertPlace) -> Iterator[Fragment]:
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * optimizer._get_param_partition_rank(parameter)
    owned = min(size, parameter.ds_numel - start)  # the last partition is padded
    if owned > 0:
        shape, first = experts.whole(name, tuple(parameter.ds_shape))
        flat = optimizer.fp32_partitioned_groups_flat[group]
        values = _views(optimizer, optimizer.sub_group_to_group_id[group], flat, offset, owned)
        yield Fragment(name, shape, first + start, values)


def _views(optimizer: Any, group: int, flat: Tensor, start: int, size: int) -> dict[str, Tensor]:
    """Weight and moments of a range of a flat tensor that belongs to a parameter group of the optimizer."""
    state = optimizer.optimizer.state[flat]
    if not state and optimizer.optimizer.param_groups[group].get("use_muon"):
        state.update(momentum_buffer=torch.zeros_like(flat))
    elif not state:
        state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
    moments = {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape}
    return {name: value.data.narrow(0, start, size) for name, value in {WEIGHT: flat, **moments}.items()}
