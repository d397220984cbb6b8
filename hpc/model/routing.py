"""What the routers of a MoE model do: load per expert, and the loss that keeps it even.

Works on a plain transformers model and on one whose MoE blocks were replaced by expert-parallel layers, by listening
to the module that computes the router's logits.

Shape letters: T tokens of a micro-batch on this rank, E experts, K experts per token, L MoE layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Heard:
    """What the routers did in the forward passes of one micro-batch."""

    aux_loss: Tensor
    """Balancing loss, mean over layers: E * sum_e f_e P_e, with f the fraction of assignments that went to expert e
    over all ranks and P the mean router probability (Switch Transformer, arXiv:2101.03961, eq. 4-6, f divided by K): 1
    when load is even, E when one expert gets everything. Counts are global, so the mean of the ranks' losses does not
    depend on the number of ranks."""
    z_loss: Tensor
    """Mean over layers and tokens of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906, eq. 5): keeps logits small."""
    counts_LE: Tensor
    """Assignments of all ranks."""


class RouterProbe:
    """Listens to every router of a model during forward passes."""

    def __init__(self, model: nn.Module, top_k: int) -> None:
        self.top_k = top_k
        self._logits: list[Tensor] = []
        gates = [module for name, module in model.named_modules() if _is_gate(name, module)]
        self.num_layers = len(gates)
        for gate in gates:
            gate.register_forward_hook(self._listen)

    def _listen(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._logits.append(output[0] if isinstance(output, tuple) else output)

    def collect(self) -> Heard:
        """What was heard since the last call. Collective when a process group exists."""
        logits, self._logits = [layer.float() for layer in self._logits], []
        probabilities = [torch.softmax(layer, -1) for layer in logits]  # each (T, E)
        counts_LE = torch.stack(
            [torch.bincount(p.topk(self.top_k, -1).indices.flatten(), minlength=p.shape[-1]) for p in probabilities]
        ).float()
        if dist.is_initialized():
            dist.all_reduce(counts_LE)
        fractions_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
        mean_LE = torch.stack([p.mean(0) for p in probabilities])
        aux_loss = (fractions_LE * mean_LE).sum(-1).mean() * counts_LE.shape[-1]
        z_loss = torch.stack([layer.logsumexp(-1).square().mean() for layer in logits]).mean()
        return Heard(aux_loss, z_loss, counts_LE)

    def discard(self) -> None:
        """Forget what was heard, after passes that do not train."""
        self._logits.clear()


def _is_gate(name: str, module: nn.Module) -> bool:
    """The module that computes router logits: AutoEP's router holds it as `gate`, transformers' router is it."""
    return name.endswith(".mlp.router.gate") or (
        type(module).__name__.endswith("TopKRouter") and not hasattr(module, "gate")
    )


def load_metrics(counts_LE: Tensor) -> dict[str, Any]:
    """Load per layer and expert as fractions, worst max/mean over layers, and lowest normalised entropy (1 = even)."""
    fractions = counts_LE / counts_LE.sum(-1, keepdim=True)
    entropy = -(fractions * fractions.clamp_min(1e-12).log()).sum(-1) / torch.tensor(float(fractions.shape[-1])).log()
    return {
        "router_load": [[round(value, 5) for value in layer] for layer in fractions.tolist()],
        "router_max_over_mean": float(fractions.max(-1).values.max() * fractions.shape[-1]),
        "router_min_entropy": float(entropy.min()) if fractions.shape[-1] > 1 else 1.0,
    }


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
