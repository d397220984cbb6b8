"""The programs that `bench train` lets run against each other: one step each, over the same tokens and weights.

Peers get what serves them best here: fused AdamW, their grouped experts where they have them, no balancing loss (we
compute ours), our allocator settings. What differs is named in their docstring, which the table shows.

Shape letters: B sequences, S tokens of one, H hidden, I intermediate, E experts.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hpc.bench.turns import Program, Turns
from hpc.config.train import Training
from hpc.model.build import build_model, model_config
from hpc.model.routing import RouterProbe
from hpc.run.task import World
from hpc.train.engine import Engine, apply_autoep_shim, start_process_group


@dataclass(frozen=True)
class Case:
    """One model and its batches."""

    settings: Training
    vocab_size: int
    ranks: int

    def model(self, experts: str = "grouped_mm") -> PreTrainedModel:
        """The transformers model, with the same weights for everybody who takes it."""
        shape, router = self.settings.model, self.settings.router
        config = model_config(shape, router, self.vocab_size, self.settings.batches.seq_len, 0)
        model = build_model(config, seed=0)
        model.set_experts_implementation(experts)
        return model

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return self.settings.gradient_accumulation_steps

    def steps(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The micro-batches of one step after the other."""
        batches = self.batches()
        while True:
            yield [next(batches) for _ in range(self.accumulation)]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets (B, S) of this rank, without end, the same for every side."""
        generator = torch.Generator().manual_seed(torch.distributed.get_rank() if self.ranks > 1 else 0)
        shape = (self.settings.batches.micro_batch_size, self.settings.batches.seq_len + 1)
        while True:
            ids = torch.randint(0, self.vocab_size, shape, generator=generator)
            yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """AdamW with the settings of ours."""
        options = self.settings.optimizer
        return torch.optim.AdamW(parameters, options.lr, options.betas, options.eps, options.weight_decay, fused=True)


def ours(turns: Turns, case: Case) -> None:
    """this engine, as the training loop uses it, with balancing loss and routing counts"""
    _process_group()
    settings = case.settings
    engine = Engine(case.model(), settings, "cpu")
    probe = RouterProbe(engine.module)
    turns.start()
    for step in case.steps():
        for ids, targets in step:
            loss = engine.loss(ids, targets)
            engine.backward(loss + settings.router.aux_loss * probe.collect().aux_loss)
            engine.step(settings.optimizer.lr)
        turns.step(float(loss))


def hf_eager(turns: Turns, case: Case) -> None:
    """transformers Trainer, its eager experts"""
    _hf_trainer(turns, case, "eager")


def hf_grouped(turns: Turns, case: Case) -> None:
    """transformers Trainer, its grouped_mm experts"""
    _hf_trainer(turns, case, "grouped_mm")


def _hf_trainer(turns: Turns, case: Case, experts: str) -> None:
    class Stream(IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for ids, targets in case.batches():
                for row, wanted in zip(ids, targets, strict=True):
                    yield {"input_ids": row, "labels": wanted, "shift_labels": wanted}

    class Follow(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step(trainer.last_loss)

    class Remembering(Trainer):
        last_loss = float("nan")

        def training_step(self, *args: Any, **options: Any) -> Tensor:
            loss = super().training_step(*args, **options)
            self.last_loss = float(loss) * case.accumulation
            return loss

    if case.ranks == 1:
        _alone()
    options, batches = case.settings.optimizer, case.settings.batches
    arguments = TrainingArguments(
        output_dir="unused", use_cpu=True, max_steps=10**6, per_device_train_batch_size=batches.micro_batch_size,
        gradient_accumulation_steps=case.accumulation,
        learning_rate=options.lr, adam_beta1=options.betas[0], adam_beta2=options.betas[1],
        weight_decay=options.weight_decay, max_grad_norm=options.gradient_clipping, optim="adamw_torch_fused",
        lr_scheduler_type="constant", logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    model = case.model(experts)
    trainer = Remembering(model=model, args=arguments, train_dataset=Stream(), callbacks=[Follow()])
    trainer.train()


def hf_deepspeed(turns: Turns, case: Case) -> None:
    """transformers model with grouped_mm experts in DeepSpeed ZeRO 1"""
    _process_group()
    _deepspeed(turns, case, case.model(), {})


def autoep(turns: Turns, case: Case) -> None:
    """DeepSpeed's AutoEP as it comes (its own grouped experts), ZeRO 1"""
    _process_group()
    apply_autoep_shim()
    section = {"enabled": True, "autoep_size": case.ranks, "preset_model": "qwen3_moe"}
    _deepspeed(turns, case, case.model(), {"expert_parallel": section})


class SwiGLU(nn.Module):
    """One expert as DeepSpeed's MoE layer wants it."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(functional.silu(gate) * up)
        return out


class DeepSpeedMoE(nn.Module):
    """DeepSpeed's own MoE layer with the weights of a transformers block; no token dropped."""

    def __init__(self, block: Any, top_k: int, ranks: int) -> None:
        super().__init__()
        gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
        experts, hidden, inner = down.shape
        self.moe = deepspeed.moe.layer.MoE(
            hidden, SwiGLU(hidden, inner), num_experts=experts, ep_size=ranks, k=top_k, drop_tokens=False,
            min_capacity=1, use_rts=False, top2_2nd_expert_sampling=False,
        )  # fmt: skip
        local = self.moe.deepspeed_moe.experts.deepspeed_experts
        first = len(local) * (torch.distributed.get_rank() % ranks)
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(block.gate.weight)
            for number, expert in enumerate(local):
                expert.gate_up.weight.copy_(gate_up[first + number])
                expert.down.weight.copy_(down[first + number])

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        out: Tensor = self.moe(x)[0]
        return out


def deepspeed_moe(turns: Turns, case: Case) -> None:
    """DeepSpeed's MoE layer (capacity grows until no token is dropped), ZeRO 1"""
    _process_group()
    model = case.model()
    for layer in model.model.layers:
        layer.mlp = DeepSpeedMoE(layer.mlp, case.settings.router.top_k, case.ranks)
    _deepspeed(turns, case, model, {})


def _deepspeed(turns: Turns, case: Case, model: nn.Module, more: dict[str, Any]) -> None:
    """The usual loop around a DeepSpeed engine."""

    def optimizer(_: Any) -> torch.optim.Optimizer:
        groups = [{"name": "all", "params": list(model.parameters())}]
        if any(is_moe_param(parameter) for parameter in model.parameters()):
            groups = split_params_into_different_moe_groups_for_optimizer(groups)
        return case.optimizer(groups)

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": case.settings.batches.micro_batch_size,
            "gradient_accumulation_steps": case.accumulation,
            "gradient_clipping": case.settings.optimizer.gradient_clipping,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_bucket_size": 100_000_000},
            **more,
        },
    )
    turns.start()
    for step in case.steps():
        for ids, targets in step:
            loss = engine(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss
            engine.backward(loss)
            engine.step()
        turns.step(float(loss))


GET_LITGPT = (
    "pip install --no-deps litgpt==0.5.13 lightning==2.6.1 lightning-utilities==0.15.3 torchmetrics==1.9.0 "
    "jsonargparse==4.41.0"
)
"""It pins a huggingface-hub that transformers 5 is too new for, so it comes without what it depends on."""


def litgpt(turns: Turns, case: Case) -> None:
    """LitGPT's model and the loop of its pretraining script; its own random weights"""
    if case.ranks > 1:
        raise ImportError("one rank only in this bench")
    try:
        import lightning
        from litgpt.config import Config
        from litgpt.model import GPT
        from litgpt.utils import chunked_cross_entropy
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: {GET_LITGPT}") from None

    _alone()
    shape, router = case.settings.model, case.settings.router
    config = Config(
        block_size=case.settings.batches.seq_len, padded_vocab_size=case.vocab_size, vocab_size=case.vocab_size,
        n_layer=shape.num_layers, n_head=shape.num_attention_heads, n_query_groups=shape.kv_heads,
        n_embd=shape.hidden_size, head_size=shape.head_dim, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", norm_qk=True, norm_eps=1e-6, mlp_class_name="LLaMAMoE",
        intermediate_size=shape.expert_size, moe_intermediate_size=shape.expert_size,
        n_expert=router.num_experts, n_expert_per_token=router.top_k,
    )  # fmt: skip
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    bare = GPT(config)
    for parameter in bare.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=shape.initializer_range)
    model, optimizer = fabric.setup(bare, case.optimizer(bare.parameters()))
    turns.start()
    for step in case.steps():
        for ids, targets in step:
            loss = chunked_cross_entropy(model(ids), targets)
            fabric.backward(loss / case.accumulation)
        fabric.clip_gradients(model, optimizer, max_norm=case.settings.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        turns.step(float(loss))


EAGER = "HF Trainer, eager"
PEERS: dict[str, Program] = {
    EAGER: hf_eager,
    "HF Trainer, grouped_mm": hf_grouped,
    "HF + DeepSpeed ZeRO 1": hf_deepspeed,
    "AutoEP": autoep,
    "DeepSpeed MoE": deepspeed_moe,
    "LitGPT": litgpt,
}


def _alone() -> None:
    """No process group around a program that would wrap its model for one."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"):
        os.environ.pop(name, None)


def _process_group() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start_process_group(World(rank, size, rank), "cpu")
