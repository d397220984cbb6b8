"""Causal attention in fp32 on CPUs: blocks of queries against the keys before them, through oneDNN's products.

PyTorch's own kernel multiplies through MKL (see `hpc.model.products`); its backward pass took a quarter of a step. The
same softmax here, a block at a time in cache; probabilities are computed again from the kept log-sums in the backward
pass (FlashAttention, arXiv:2205.14135, algorithms 1 and 4, with whole rows of keys). That pass holds scores with keys
as rows, so that only dQ needs a product with the narrow factor turned, and log-sums and row sums enter as biases.

Shape letters: B sequences, N query heads, M key/value heads, S positions, D head width; of one block: R queries, C keys
they may see.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hpc.model.products import product, serves

NAME = "causal_blocks"
"""What transformers calls it."""
BLOCK = 128
SHORTEST = 384
"""Positions below which PyTorch's kernel is as fast (measured: 256 positions 10 against 11 ms, 512 41 against 24)."""


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = (query * scale).contiguous(), key.contiguous(), value.contiguous()
        batch, heads, length, width = query.shape
        out = query.new_empty(batch, length, heads, width)
        peaks = query.new_empty(batch, heads, length, 1)
        sums = torch.empty_like(peaks)
        future_RR = _future(min(BLOCK, length))
        for b, n, m in _heads(query, key):
            q_SD, k_SD, v_DS = query[b, n], key[b, m], value[b, m].T
            for rows in _blocks(length):
                scores_RC = product(q_SD[rows], k_SD[: rows.stop])
                own = rows.stop - rows.start
                scores_RC[:, rows.start :] += future_RR[:own, :own]
                peak_R1, sum_R1 = peaks[b, n, rows], sums[b, n, rows]
                torch.amax(scores_RC, 1, keepdim=True, out=peak_R1)
                torch.sum(scores_RC.sub_(peak_R1).exp_(), 1, keepdim=True, out=sum_R1)
                torch.div(product(scores_RC, v_DS[:, : rows.stop]), sum_R1, out=out[b, rows, n])
        ctx.save_for_backward(query, key, value, out, peaks + sums.log())
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, log_sums = ctx.saved_tensors
        dquery, dkey, dvalue = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        length = query.shape[2]
        future_RR = _future(min(BLOCK, length)).T.contiguous()
        minus_inner = -(gradients[0] * out).sum(-1)  # (B, S, N)
        minus_log_sums = -log_sums.squeeze(-1)
        dout = gradients[0].transpose(1, 2).contiguous()
        for b, n, m in _heads(query, key):
            q_SD, k_SD, v_SD, dout_SD = query[b, n], key[b, m], value[b, m], dout[b, n]
            k_DS = k_SD.T.contiguous()
            inner_S = minus_inner[b, :, n].contiguous()
            for rows in _blocks(length):
                seen, own = slice(rows.stop), rows.stop - rows.start
                p_CR = product(k_SD[seen], q_SD[rows], minus_log_sums[b, n, rows])
                p_CR[rows.start :] += future_RR[:own, :own]
                p_CR.exp_()
                dvalue[b, m, seen] += product(p_CR, dout_SD[rows].T)
                ds_CR = product(v_SD[seen], dout_SD[rows], inner_S[rows]).mul_(p_CR)
                dkey[b, m, seen] += product(ds_CR, q_SD[rows].T)
                dquery[b, n, rows] = product(k_DS[:, seen], ds_CR.T).T
        return dquery.mul_(ctx.scale), dkey, dvalue, None


_causal: Callable[..., Tensor] = _Causal.apply


def _heads(query: Tensor, key: Tensor) -> Iterator[tuple[int, int, int]]:
    """Sequence, query head, and the key/value head that it shares with its group."""
    for b in range(query.shape[0]):
        for n in range(query.shape[1]):
            yield b, n, n * key.shape[1] // query.shape[1]


def _blocks(length: int) -> Iterator[slice]:
    for first in range(0, length, BLOCK):
        yield slice(first, min(first + BLOCK, length))


def _future(rows: int) -> Tensor:
    """What is added to scores: nothing for a key at or before the query, minus infinity after it."""
    return torch.full((rows, rows), float("-inf")).triu_(1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query (B, N, S, D), key and value (B, M, S, D) with M a divisor of N -> (B, S, N, D). fp32."""
    return _causal(query, key, value, scale)


def _transformers_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: ours for whole causal sequences, PyTorch's kernel for masks, caches and dropout."""
    plain = attention_mask is None and not options.get("dropout") and query.shape[2] == key.shape[2] >= SHORTEST
    if plain and options.get("sliding_window") is None and serves(query.device, query.dtype):
        return causal_attention(query, key, value, options.get("scaling") or query.shape[-1] ** -0.5), None
    answer: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return answer


AttentionInterface.register(NAME, _transformers_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_attention(model: nn.Module) -> None:
    """Let a transformers model attend through this module where PyTorch's kernel would be used."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) == "sdpa":
        config._attn_implementation = NAME
