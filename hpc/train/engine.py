"""The door to DeepSpeed: ZeRO data parallelism with expert parallelism (AutoEP) over a transformers model.

DeepSpeed's own habits that matter here, seen with version 0.19.8:
* AutoEP reads a registry of transformers in a way that transformers >= 5.2 changed: `apply_autoep_shim`.
* the shared-memory collective for CPUs is compiled for minutes at start although gloo does the work: switched off.
* its expert-parallel section does not refuse unknown keys: the dictionary is built here and nowhere else.
* an update whose global gradient norm is not finite is left out on all ranks, whatever the precision and ZeRO stage;
  it counts as a step, and `step` says so. That is also how an update is left out on purpose.
"""

import logging
import math
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from hpc.config import AdapterTraining, TrainingBase
from hpc.model.attention import use_attention
from hpc.model.blocks import overlap_shared_experts, prepare_blocks
from hpc.model.experts import check_available, use_backend
from hpc.model.loss import LossHead
from hpc.model.packing import Packed, hollow, pack, settle
from hpc.model.products import use_products
from hpc.model.routing import route_in_fp32, router_biases
from hpc.run.task import World
from hpc.train.deepspeed_config import deepspeed_config, needs_autoep
from hpc.train.fragments import (
    WEIGHT,
    ExpertPlace,
    Fragment,
    Rename,
    Source,
    copy_fragments,
    count_bytes,
    fill_weights,
    frozen_fragments,
    logical_name,
    read_fragments,
    write_fragments,
    zero_fragments,
)
from hpc.train.optimizer import parameter_groups
from hpc.train.saving import Copy, Write

GROUP_TIMEOUT_S = 300.0
"""A collective that waits longer than this means a lost rank; the libraries' own limits are 10 to 30 minutes."""


def pick_device(wanted: str) -> str:
    """`cuda` or `cpu` for the setting `auto | cpu | cuda`."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def start_process_group(world: World, device: str, timeout_s: float = GROUP_TIMEOUT_S) -> None:
    """Join the process group described by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: nccl or gloo.

    timeout_s: of a collective. Where a watchdog looks on, longer than its bounds: it knows more than a time-out tells.
    """
    deepspeed_logger.setLevel(logging.ERROR)
    if device == "cuda":
        torch.cuda.set_device(world.local_rank)
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if device == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )


class Engine:
    """One model in training. Methods marked collective are called by all ranks together."""

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingBase,
        device: str,
        *,
        changes_frozen: bool = False,
        filled_later: bool = False,
    ) -> None:
        """changes_frozen: whether weights that are not trained change all the same, so that checkpoints hold them.
        filled_later: whether `fill` gives the weights; what it does not is equal on all ranks by its seed."""
        precision = settings.precision
        if precision == "auto":
            precision = "bf16" if device == "cuda" else "fp32"
        self.precision, self.settings, self.device = precision, settings, device
        self._host: dict[str, Tensor] = {}
        self._changes_frozen = changes_frozen
        self._autoep = needs_autoep(settings)
        check_available(settings.expert_compute, device, precision)
        if self._autoep:
            apply_autoep_shim()
        self._model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
        prepare_blocks(model, settings)
        is_packed = isinstance(settings, AdapterTraining) and settings.base_bits is not None
        widths = hollow(model) if is_packed else {}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with _not_sent() if filled_later else nullcontext():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=trained,
                optimizer=lambda _: self._optimizer(model),
                config=deepspeed_config(settings, precision, self._model_type, device, sum(p.numel() for p in trained)),
            )
        self.module: nn.Module = self._engine.module
        settle(self.module, widths)
        use_backend(self.module, settings.expert_compute)
        use_products(self.module)
        if settings.attention_kernel == "auto":
            use_attention(self.module)
        self._head = LossHead(self.module)
        route_in_fp32(self.module)
        if device == "cuda" and self._autoep and settings.parallel.zero_stage < 3:
            overlap_shared_experts(self.module)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The update rule over its groups; called once experts are placed."""
        options = self.settings.optimizer
        groups = parameter_groups(model, options)
        if self._autoep:
            groups = split_params_into_different_moe_groups_for_optimizer(groups)
        if options.kind == "muon":
            return _muon(groups, self.device)
        return torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, fused=True)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits (B, S, V) of token ids (B, S). Collective under expert parallelism.

        positions (B, S): places of tokens in their documents; where they restart, attention does not look back.
        """
        placed = None if positions is None else positions.to(self.device)
        logits: Tensor = self._engine(input_ids=input_ids.to(self.device), position_ids=placed, use_cache=False).logits
        return logits

    def loss(self, input_ids: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        """Mean loss (nats) of targets (B, S) after token ids (B, S), without keeping the logits of all tokens.
        Collective under expert parallelism."""
        return self._head.loss(lambda: self.forward(input_ids, positions), targets.to(self.device))

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this rank's mean loss. Collective."""
        self._engine.backward(loss)

    def step(self, learning_rate: float, *, drop: bool = False) -> bool:
        """Count a micro-batch and, at the end of the accumulation, update the weights. Collective.

        Returns False when no rank updated: between updates, because the gradient norm is not finite, or because of
        `drop`, which throws all accumulated gradients away and leaves weights and moments as they are.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if drop:
            self._spoil_gradients()
        self._engine.step()
        return bool(self._engine.was_step_applied())

    def _spoil_gradients(self) -> None:
        """Make the gradient norm NaN, so that DeepSpeed's own way of leaving an update out clears all its buffers."""
        for group in self._engine.optimizer.averaged_gradients.values():
            for gradient in group or ():
                gradient.fill_(math.nan)

    def rehearse(self, passes: Callable[[], object]) -> None:
        """Call `passes`, forward and backward as in training, and undo what it did to gradients, counters and random
        numbers: nothing of the run changes but the memory it has touched. Collective."""
        engine, random = self._engine, torch.get_rng_state()
        names = ("micro_steps", "global_steps", "global_samples", "skipped_steps")
        before = [getattr(engine, name) for name in names]
        engine.micro_steps = self.settings.gradient_accumulation_steps - 1  # the last of a step: gradients are reduced
        passes()
        self.step(self.settings.optimizer.lr, drop=True)
        for name, value in zip(names, before, strict=True):
            setattr(engine, name, value)
        torch.set_rng_state(random)

    @property
    def peak_memory_bytes(self) -> int:
        """The most that this process has held so far: of the accelerator, or resident on a CPU."""
        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def gradient_norm(self) -> float | None:
        """Global gradient norm of the last step, before clipping; None when it was not finite, or dropped."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None or not math.isfinite(norm) else float(norm)

    @property
    def updates(self) -> int:
        """Updates made so far, steps that were left out not counted: what Adam's bias correction goes by."""
        return int(self._engine.global_steps - self._engine.skipped_steps)

    def save(self, folder: Path) -> None:
        """Write this rank's fragments of weights and optimizer states into `folder`. No collective is needed."""
        self.snapshot(to_host=False)()(folder)

    def snapshot(self, *, to_host: bool) -> Copy:
        """What `save` would write now, for a thread: a function that copies it and returns what writes it.

        The copy may run beside forward and backward passes, not beside an update: those alone change what it reads.
        Its host memory is kept for the next one. Without `to_host` the state itself is written and must hold still.
        """
        fragments, step, rank = self._fragments(), self.updates, dist.get_rank()
        ready = torch.cuda.Event() if self.device == "cuda" else None
        if ready is not None:
            ready.record()

        def copy() -> Write:
            held = copy_fragments(fragments, self._host, ready) if to_host else fragments
            return lambda folder: write_fragments(folder, rank, held, step)

        return copy

    @property
    def checkpoint_bytes(self) -> int:
        """What this rank's part of a checkpoint takes on the disk, and to_host in memory."""
        return count_bytes(self._fragments())

    def load(self, folder: Path) -> None:
        """Read what `save` wrote with any number of ranks, expert parallelism and ZeRO stage. Collective.

        Raises ArtifactError when the checkpoint lacks an element of this model.
        """
        optimizer = self._engine.optimizer
        frozen = frozen_fragments(self.module, self.place) if self._changes_frozen else []
        step = read_fragments(folder, [*frozen, *self._trained_fragments()])
        for state in optimizer.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(step))  # one for each: a shared one would advance once per group
        self._use_masters()
        self._engine.global_steps, self._engine.skipped_steps = step, 0
        self._engine.micro_steps = step * self.settings.gradient_accumulation_steps

    def fill(self, source: Source, rename: Rename = str) -> None:
        """Take all weights from a checkpoint of another program, each rank the elements that it owns. Collective.

        rename: from a name here to that of the source; None for what stays as it is. Raises ArtifactError when the
        source lacks an element of this model.
        """
        fill_weights(source, [*frozen_fragments(self.module, self.place), *self._trained_fragments()], rename)
        self._pack(source, rename)
        self._use_masters()

    def _pack(self, source: Source, rename: Rename) -> None:
        """Take what is held in four bits. A rank never holds more than one matrix of it in full."""
        place = self.place

        def read(packed: Packed, target: Tensor) -> None:
            known_as = rename(packed.name)
            assert known_as is not None, "what is frozen comes from the source"
            source.fill(logical_name(known_as), place.whole(packed.name, packed.shape)[1] + packed.start, target)

        pack(self.module, read, self.device)

    def _use_masters(self) -> None:
        """Compute with what the optimizer holds from now on. Collective."""
        optimizer = self._engine.optimizer
        if self.settings.parallel.zero_stage == 3:
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        else:
            optimizer.update_lp_params()

    @property
    def place(self) -> ExpertPlace:
        """Which experts this rank holds."""
        size = self.settings.parallel.expert_parallel_size
        rank = deepspeed.utils.groups._get_expert_parallel_rank(f"ep_size_{size}") if size > 1 else 0
        return ExpertPlace(rank, size)

    def _fragments(self) -> list[Fragment]:
        """What this rank writes into a checkpoint."""
        frozen = frozen_fragments(self.module, self.place, own=True) if self._changes_frozen else []
        return [*frozen, *self._trained_fragments()]

    def _trained_fragments(self) -> list[Fragment]:
        owned = zero_fragments(self.module, self._engine.optimizer, self.settings.parallel.zero_stage, self.place)
        biases = [Fragment(name, tuple(b.shape), 0, {WEIGHT: b}) for name, b in router_biases(self.module).items()]
        return owned + biases

    def state_in_transformers_layout(self) -> dict[str, Tensor]:
        """All weights in fp32 under their transformers names, on the CPU. Collective; rank 0's result is complete.

        AutoEP keeps an expert's matrices as w1 (gate), w3 (up) and w2 (down), each rank its own experts; transformers
        as gate_up_proj (E, 2I, H) and down_proj (E, H, I) with all of them.
        """
        state: dict[str, Tensor] = {name: bias.cpu() for name, bias in router_biases(self.module).items()}
        parameters = dict(self.module.named_parameters())
        for name, parameter in parameters.items():
            if name.endswith(".experts.w3"):
                continue
            value = self._full_value(parameter)
            if name.endswith(".experts.w1"):
                up = self._full_value(parameters[name[:-2] + "w3"])
                state[name[:-2] + "gate_up_proj"] = self._gather_experts(torch.cat([value, up], dim=1))
            elif name.endswith(".experts.w2"):
                state[name[:-2] + "down_proj"] = self._gather_experts(value)
            else:
                state[self._transformers_name(name)] = value.cpu()
        return state

    def trained_state(self) -> dict[str, Tensor]:
        """What is trained, in fp32 by its names here, with all experts, on the CPU. Collective; rank 0's is whole."""
        state = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                value = self._full_value(parameter)
                state[name] = self._gather_experts(value) if self.place.is_split(name) else value.cpu()
        return state

    def rewrite(self, parameters: list[nn.Parameter], change: Callable[[], None]) -> None:
        """Change whole parameters, in the same way on every rank that holds them. Collective.

        What the optimizer works on follows; its moments stay.
        """
        with torch.no_grad():
            if self.settings.parallel.zero_stage == 3:
                with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
                    change()
            else:
                change()
        changed = {id(parameter) for parameter in parameters}
        names = {name for name, p in self.module.named_parameters() if id(p) in changed and p.requires_grad}
        held = dict(self.module.named_parameters())
        for fragment in self._trained_fragments():
            if fragment.name in names:
                fragment.values[WEIGHT].copy_(self._held(held[fragment.name], fragment))

    def _held(self, parameter: Any, fragment: Fragment) -> Tensor:
        """What this rank's parameter has where a fragment of the optimizer is."""
        if self.settings.parallel.zero_stage == 3:
            part: Tensor = parameter.ds_tensor.data.narrow(0, 0, fragment.size)
            return part
        start = fragment.start - self.place.whole(fragment.name, tuple(parameter.shape))[1]
        flat: Tensor = parameter.data.view(-1)[start : start + fragment.size]
        return flat

    def moments(self) -> dict[str, Fragment]:
        """This rank's ranges of the optimizer's moments, by parameter: views of what it works on."""
        return {fragment.name: fragment for fragment in self._trained_fragments()}

    def whole_shape(self, name: str, parameter: Any) -> tuple[int, ...]:
        """The shape of a parameter with all experts, wherever they are."""
        return self.place.whole(name, tuple(getattr(parameter, "ds_shape", parameter.shape)))[0]

    def _transformers_name(self, name: str) -> str:
        name = name.replace(".mlp.router.gate.", ".mlp.gate.")
        if self._model_type == "qwen2_moe":
            name = name.replace(".mlp.shared_experts", ".mlp.shared_expert")
        return name

    def _full_value(self, parameter: nn.Parameter) -> Tensor:
        if not parameter.requires_grad and self.settings.parallel.zero_stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().float().clone()
        if not parameter.requires_grad or (self.precision == "fp32" and self.settings.parallel.zero_stage < 3):
            return parameter.detach().float().clone()
        full: Tensor = safe_get_full_fp32_param(parameter)
        return full.detach().clone()

    def _gather_experts(self, local: Tensor) -> Tensor:
        """Experts of all ranks of this rank's expert-parallel group, in order, on the CPU."""
        size = self.settings.parallel.expert_parallel_size
        if size == 1:
            return local.cpu()
        parts = [torch.empty_like(local) for _ in range(size)]
        dist.all_gather(
            parts, local.contiguous(), group=deepspeed.utils.groups._get_expert_parallel_group(f"ep_size_{size}")
        )
        return torch.cat(parts).cpu()


@contextmanager
def _not_sent() -> Iterator[None]:
    """Keep DeepSpeed from sending rank 0's weights to all ranks at its start: where they are about to be filled in it
    would touch memory that nobody needs, under ZeRO-3 the whole model on every rank but the first."""
    engine: Any = deepspeed.DeepSpeedEngine
    send = engine._broadcast_model
    engine._broadcast_model = lambda _: None
    try:
        yield
    finally:
        engine._broadcast_model = send


def _muon(groups: list[dict[str, Any]], device: str) -> torch.optim.Optimizer:
    """DeepSpeed's Muon with AdamW for the rest. Imported here because it takes torch's compiler along.

    On a CPU its iteration runs in fp32, uncompiled: bf16 is emulated on most, its rounding would let the curve depend
    on the layout, and compiling takes longer than it saves.
    """
    from deepspeed.runtime.zero.muon import original_muon
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if device == "cpu":
        original_muon.ns_compute_dtype = lambda _method: torch.float32
        torch.compiler.set_stance("force_eager")
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(groups)
    return optimizer


def apply_autoep_shim() -> None:
    """Let AutoEP ask transformers' recorder registry by a string key, as it does in DeepSpeed 0.19.8.

    transformers >= 5.2 made that `get` take a model; a string asked for there raised TypeError. A test watches whether
    DeepSpeed still needs this (tests/train/test_engine.py).
    """
    from transformers.utils import output_capturing

    registry: Any = output_capturing._CanRecordRegistry
    if getattr(registry, "_accepts_strings", False):
        return
    original = registry.get

    def get(self: Any, key: Any, *default: Any) -> Any:
        return dict.get(self, key, *default) if isinstance(key, str) else original(self, key)

    registry.get = get
    registry._accepts_strings = True
