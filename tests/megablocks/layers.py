"""MegaBlocks' dropless MoE layer in a small size, and transformers' weights in its layout.

Shape letters as in hpc/model/experts.py. Importing this module puts the stand-ins in place.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.megablocks import cpu_ops

cpu_ops.install()

from megablocks import Arguments, dMoE  # noqa: E402

E, K, H, INNER = 8, 2, 32, 48


def arguments(
    num_experts: int = E, top_k: int = K, hidden: int = H, inner: int = INNER, group: Any = None
) -> Arguments:
    """A SwiGLU layer with normalized weights and no capacity, in fp32 on the CPU."""
    return Arguments(
        hidden_size=hidden,
        ffn_hidden_size=inner,
        moe_num_experts=num_experts,
        moe_top_k=top_k,
        moe_normalize_expert_weights=1,
        moe_loss_weight=0.0,
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=functional.silu,
        bias=False,
        return_bias=False,
        fp16=False,
        device=torch.device("cpu"),
        init_method=lambda weight: torch.nn.init.normal_(weight, std=0.2),
        output_layer_init_method=lambda weight: torch.nn.init.normal_(weight, std=0.2),
        moe_expert_model_parallelism=group is not None,
        expert_parallel_group=group,
    )


def dmoe(group: Any = None) -> tuple[Any, Tensor]:
    """A layer and an input (8, 3, H), the same on every rank and without ranks."""
    torch.manual_seed(5)
    return dMoE(arguments(group=group)), torch.randn(8, 3, H, generator=torch.Generator().manual_seed(6))


def to_megablocks(gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """transformers' gate_up_proj (E, 2I, H) and down_proj (E, H, I) as MegaBlocks' w1, v1, w2, each (E * I, H)."""
    gate, up = gate_up.chunk(2, dim=1)
    return {
        "mlp.w1": gate.reshape(-1, gate.shape[-1]),
        "mlp.v1": up.reshape(-1, up.shape[-1]),
        "mlp.w2": down.transpose(1, 2).reshape(-1, down.shape[1]),
    }
