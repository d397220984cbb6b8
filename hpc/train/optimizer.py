"""Which parameter is updated how: weight decay, and Muon for the matrices of the blocks.

    decayed     matrices of the blocks, routers, head        weight decay
    undecayed   norms, biases, embedding                     none (embedding: OLMo 2, arXiv:2501.00656, section 3.3)
    muon        with optimizer.kind = muon: matrices of attention, experts, shared experts and dense layers

DeepSpeed's Muon takes marks on parameters: `use_muon`, and `is_expert_group` for (E, I, H), where every expert is
orthogonalised for itself.
"""

from typing import Any

from torch import nn

from hpc.config import Optimizer

BLOCK_MATRICES = (".self_attn.", ".experts.", ".shared_experts.", ".mlp.gate_proj.", ".mlp.up_proj.", ".mlp.down_proj.")


def parameter_groups(model: nn.Module, options: Optimizer) -> list[dict[str, Any]]:
    """Groups for the optimizer, each with a name, its parameters and what differs; empty groups are left out.

    `lr_scale` is the factor on the scheduled learning rate.
    """
    groups: dict[str, dict[str, Any]] = {
        "muon": {"use_muon": True, "weight_decay": options.weight_decay, "momentum": options.muon_momentum,
                 "lr": options.muon_lr, "lr_scale": options.muon_lr / options.lr, "ns_method": "standard"},
        "decayed": {"weight_decay": options.weight_decay},
        "undecayed": {"weight_decay": 0.0},
    }  # fmt: skip
    for name in ("decayed", "undecayed"):
        groups[name].update(lr=options.lr, lr_scale=1.0)
        if options.kind == "muon":
            groups[name].update(use_muon=False, betas=options.betas, eps=options.eps)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = group_of(name, parameter, options)
            if options.kind == "muon":
                marked: Any = parameter
                marked.use_muon = kind == "muon"
                marked.is_expert_group = parameter.dim() == 3
            groups[kind].setdefault("params", []).append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if "params" in group]


def group_of(name: str, parameter: nn.Parameter, options: Optimizer) -> str:
    """The group of a parameter, by its name and its number of dimensions."""
    if parameter.dim() < 2 or ".embed_tokens." in f".{name}":
        return "undecayed"
    is_block_matrix = any(part in name for part in BLOCK_MATRICES)
    return "muon" if options.kind == "muon" and is_block_matrix else "decayed"
