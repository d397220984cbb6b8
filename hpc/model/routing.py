"""What the routers of a MoE model do: load per expert, the loss and the bias that keep it even.

Works on a plain transformers model and on one whose MoE blocks were replaced by expert-parallel layers, by listening
to the modules that compute the router's logits and its choice.

Shape letters: T tokens of a micro-batch on this rank, E experts, K experts per token, L MoE layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

BIAS = "e_score_correction_bias"
"""DeepSeek-V3's buffer (E): added to the scores when experts are chosen, and not when their outputs are weighted."""


@dataclass(frozen=True)
class Heard:
    """What the routers did in the forward passes of one micro-batch."""

    aux_loss: Tensor
    """Balancing loss, mean over layers: E * sum_e f_e P_e, with f the fraction of assignments that went to expert e
    over all ranks and P the mean score, normalised over experts (Switch Transformer, arXiv:2101.03961, eq. 4-6, with
    f divided by K; for sigmoid scores DeepSeek-V3, arXiv:2412.19437, eq. 17-20): 1 when load is even. Counts are
    global, so the mean of the ranks' losses does not depend on the number of ranks."""
    z_loss: Tensor
    """Mean over layers and tokens of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906, eq. 5): keeps logits small."""
    counts_LE: Tensor
    """Assignments of all ranks."""


class RouterProbe:
    """Listens to every router of a model during forward passes, but not while the backward pass computes them again."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._logits: list[Tensor] = []
        self._chosen: list[Tensor] = []
        self._listening = False
        self.routers = [module for _, module in find_routers(model)]
        self._is_sigmoid = any(torch.is_tensor(getattr(router, BIAS, None)) for router in self.routers)
        for router in self.routers:
            gate = getattr(router, "gate", None)
            if isinstance(gate, nn.Module):  # AutoEP's router, which returns (weights, chosen, counts)
                gate.register_forward_hook(self._hear_logits)
            router.register_forward_hook(self._hear_choice)
        model.register_forward_pre_hook(self._begin)

    def _begin(self, *_: object) -> None:
        self._listening = True

    def _hear_logits(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self._listening:
            self._logits.append(output)

    def _hear_choice(self, router: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
        if not self._listening:
            return
        if not hasattr(router, "gate"):  # transformers' router: (logits, weights, chosen)
            self._logits.append(output[0])
        self._chosen.append(output[1] if hasattr(router, "gate") else output[2])

    def collect(self, earlier_LE: Tensor | None = None) -> Heard:
        """What was heard since the last call. Collective when a process group exists.

        earlier_LE: assignments of this step's earlier micro-batches, for a balancing loss over the whole step.
        """
        logits, chosen = [layer.float() for layer in self._logits], self._chosen
        self.discard()
        if not self.routers:  # a dense model
            return Heard(torch.zeros(()), torch.zeros(()), torch.zeros(0, 0))
        experts = logits[0].shape[-1]
        counts_LE = torch.stack([torch.bincount(layer.flatten(), minlength=experts) for layer in chosen]).float()
        if dist.is_initialized():
            dist.all_reduce(counts_LE)
        seen_LE = counts_LE if earlier_LE is None else counts_LE + earlier_LE
        fractions_LE = seen_LE / seen_LE.sum(-1, keepdim=True)
        mean_LE = torch.stack([self._shares(layer).mean(0) for layer in logits])
        aux_loss = (fractions_LE * mean_LE).sum(-1).mean() * experts
        z_loss = torch.stack([layer.logsumexp(-1).square().mean() for layer in logits]).mean()
        return Heard(aux_loss, z_loss, counts_LE)

    def discard(self) -> None:
        """Forget what was heard, and do not listen until the next forward pass."""
        self._logits, self._chosen, self._listening = [], [], False

    def _shares(self, logits_TE: Tensor) -> Tensor:
        """Scores that sum to one over experts."""
        if not self._is_sigmoid:
            return torch.softmax(logits_TE, -1)
        scores_TE = torch.sigmoid(logits_TE)
        return scores_TE / scores_TE.sum(-1, keepdim=True)


def find_routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(logical name, module) of what chooses experts, by layer: AutoEP's router, or transformers' top-k router."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "TokenChoiceTopKRouter" or kind.lower().endswith("topkrouter"):
            yield name.replace(".mlp.router", ".mlp.gate"), module


def router_biases(model: nn.Module) -> dict[str, Tensor]:
    """The biases that balance, each (E), by their name in transformers' layout; empty where there are none."""
    found = {f"{name}.{BIAS}": getattr(router, BIAS, None) for name, router in find_routers(model)}
    return {name: bias for name, bias in found.items() if torch.is_tensor(bias)}


@torch.no_grad()
def update_biases(model: nn.Module, counts_LE: Tensor, rate: float) -> None:
    """One step of balancing without a loss (arXiv:2408.15664, algorithm 1): bias += rate * sign(mean load - load).

    The counts are those of all ranks, so every rank makes the same step.
    """
    for bias, counts_E in zip(router_biases(model).values(), counts_LE, strict=True):
        bias.add_(torch.sign(counts_E.mean() - counts_E).to(bias), alpha=rate)


def route_in_fp32(model: nn.Module) -> None:
    """Let routers multiply in fp32, whatever the compute precision: near ties decide where a token goes.

    DeepSeek-V3's router in transformers does so by itself, but a model that was cast has cast its bias too.
    """
    for _, router in find_routers(model):
        if torch.is_tensor(bias := getattr(router, BIAS, None)):
            setattr(router, BIAS, bias.float())
        if isinstance(gate := getattr(router, "gate", None), nn.Module):
            gate.forward = MethodType(_fp32_linear, gate)
        elif not hasattr(router, BIAS):
            router.forward = MethodType(_fp32_softmax_router, router)


def _fp32_linear(self: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x.float(), self.weight.float())


def _fp32_softmax_router(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As transformers' routers of Mixtral, OLMoE and Qwen3-MoE, but the product in fp32."""
    x_TH = hidden_states.reshape(-1, self.hidden_dim)
    with torch.autocast(x_TH.device.type, enabled=False):
        logits_TE = functional.linear(x_TH.float(), self.weight.float())
    weights_TK, chosen_TK = torch.softmax(logits_TE, -1).topk(self.top_k, -1)
    if getattr(self, "norm_topk_prob", True):
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return logits_TE, weights_TK.to(hidden_states.dtype), chosen_TK


def load_metrics(counts_LE: Tensor, biases: dict[str, Tensor], tokens: int, top_k: int) -> dict[str, Any]:
    """Load per layer and expert as fractions, worst max/mean over layers, normalised entropy per layer (1 = even),
    assignments that reached no expert (0: nothing is dropped here), and the norm of each layer's bias."""
    fractions = counts_LE / counts_LE.sum(-1, keepdim=True)
    experts = fractions.shape[-1]
    entropy = -(fractions * fractions.clamp_min(1e-12).log()).sum(-1) / torch.tensor(float(max(2, experts))).log()
    metrics: dict[str, Any] = {
        "router_load": [[round(value, 5) for value in layer] for layer in fractions.tolist()],
        "router_max_over_mean": float(fractions.max() * experts),
        "router_max_over_mean_by_layer": [round(value * experts, 4) for value in fractions.max(-1).values.tolist()],
        "router_entropy": [round(value, 5) for value in entropy.tolist()] if experts > 1 else [1.0] * len(fractions),
        "router_dropped": round(tokens * top_k * len(fractions) - float(counts_LE.sum())),
    }
    metrics["router_min_entropy"] = min(metrics["router_entropy"])
    if biases:
        metrics["router_bias_norm"] = [round(float(bias.norm()), 6) for bias in biases.values()]
    return metrics


PASSPORT = "router_passport.json"
"""Beside the weights of a checkpoint and of a model: where its tokens went."""


def passport(counts_LE: Tensor, top_k: int, first_step: int, last_step: int) -> dict[str, Any]:
    """Assignments per layer and expert over a window of training steps, for what comes after: calibration, the choice
    of experts to adapt, bits per expert, memory under imbalance."""
    return {
        "first_step": first_step,
        "last_step": last_step,
        "top_k": top_k,
        "tokens": round(float(counts_LE[0].sum()) / top_k),
        "assignments": [[round(value) for value in layer] for layer in counts_LE.tolist()],
        "provenance": "measured: assignments of all ranks in the training steps first_step..last_step",
    }
