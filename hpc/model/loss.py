"""The head and the loss in one: mean cross-entropy in fp32 of hidden states, without the logits of all tokens.

Logits are V wide, the widest tensor of a model: for 2,048 tokens and 100,000 words 0.8 GB, three times over with their
gradients. Here they exist for ROWS tokens at a time; the gradients of hidden states and head weight are taken in the
same visit, while the logits are in the cache, and scaled when the loss's own gradient is known.

Shape letters: N tokens, H hidden, V vocabulary, R rows of one visit.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hpc.model.products import linear, product, serves, weight_gradient

ROWS = 512
IGNORED = -100
"""A target without a loss, as in `torch.nn.functional.cross_entropy`."""


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
        wanted_hidden, wanted_weight, _ = ctx.needs_input_grad
        dhidden = torch.empty_like(hidden_NH) if wanted_hidden else None
        dweight = torch.zeros_like(weight_VH, dtype=torch.float32) if wanted_weight else None
        total = torch.zeros((), device=hidden_NH.device)
        for first in range(0, len(targets_N), ROWS):
            rows = slice(first, first + ROWS)
            hidden_RH, targets_R1 = hidden_NH[rows], targets_N[rows, None]
            kept_R1 = targets_R1 != IGNORED
            targets_R1 = targets_R1.clamp_min(0)
            scores_RV = product(hidden_RH, weight_VH).float().log_softmax(-1)
            total -= (scores_RV.gather(1, targets_R1) * kept_R1).sum()
            if dhidden is None and dweight is None:
                continue
            dlogits_RV = scores_RV.exp_()
            dlogits_RV.scatter_add_(1, targets_R1, dlogits_RV.new_full(targets_R1.shape, -1.0))
            if not kept_R1.all():
                dlogits_RV *= kept_R1
            dlogits_RV = dlogits_RV.to(weight_VH.dtype)
            if dhidden is not None:
                dhidden[rows] = product(dlogits_RV, weight_VH.T)
            if dweight is not None:
                dweight += weight_gradient(dlogits_RV, hidden_RH)
        ctx.count = (targets_N != IGNORED).sum().clamp_min(1)
        ctx.gradients = (dhidden, None if dweight is None else dweight.to(weight_VH.dtype))
        loss: Tensor = total / ctx.count
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        scale = gradients[0] / ctx.count
        dhidden, dweight = (None if part is None else part * scale.to(part.dtype) for part in ctx.gradients)
        return dhidden, dweight, None


_mean_loss: Callable[..., Tensor] = _MeanLoss.apply


class LossHead:
    """Takes the place of a causal model's output layer: logits as ever, or the loss when targets are laid out.

    The model's own forward calls it, so that ZeRO 3 gathers the head's weight when it is needed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.targets: Tensor | None = None
        output = getattr(model, "get_output_embeddings", None)
        head = output() if callable(output) else None
        if not isinstance(head, nn.Linear):
            raise TypeError(f"{type(model).__name__} has no linear output layer")
        loss_head = self

        def forward(self: nn.Linear, hidden: Tensor) -> Tensor:
            if loss_head.targets is not None:
                return mean_loss(hidden, self.weight, loss_head.targets)
            if serves(hidden.device, hidden.dtype):
                return linear(hidden, self.weight)
            return nn.functional.linear(hidden, self.weight)

        setattr(head, "forward", MethodType(forward, head))  # noqa: B010  (mypy: no assignment to a method)

    def loss(self, forward: Callable[[], Tensor], targets: Tensor) -> Tensor:
        """What `forward`, which calls the model, returns as logits: here the mean loss for `targets` (B, S)."""
        self.targets = targets
        try:
            return forward()
        finally:
            self.targets = None


def mean_loss(hidden: Tensor, weight_VH: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats, a scalar) of targets (B, S) from hidden states (B, S, H)."""
    loss: Tensor = _mean_loss(hidden.reshape(-1, hidden.shape[-1]), weight_VH, targets.reshape(-1))
    return loss
