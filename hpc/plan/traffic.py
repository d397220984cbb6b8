"""Bytes that one rank sends in training, by kind of parallelism. Pure formulas; bandwidths come later.

A collective over G ranks moves (G - 1) / G of a buffer out of each rank for an all-gather, a reduce-scatter or an
all-to-all, and twice that for an all-reduce (bandwidth-optimal algorithms, Patarasuk and Yuan 2009; the "bus bandwidth"
of the NCCL tests counts the same way). All functions return bytes that one rank sends; it receives as many.

Shape letters: T tokens of a micro-batch on a rank, H hidden width, K experts per token.
"""

from dataclasses import dataclass


def share(group: int) -> float:
    """(G - 1) / G: the part of a buffer that leaves a rank."""
    return (group - 1) / group


def expert_parallel_bytes(
    tokens: float, hidden: int, top_k: float, group: int, dispatch_item: float = 2.0, combine_item: float = 2.0
) -> float:
    """Four all-to-alls of one MoE layer and micro-batch: dispatch and combine, forward and backward.

    Every token is sent to its K experts (T K H values) under balanced routing; the backward pass returns the gradients
    the same ways. Items are bytes per value: fp8 dispatch is 1. Source: GShard (arXiv:2006.16668, section 3.2).
    """
    return 2 * tokens * top_k * hidden * share(group) * (dispatch_item + combine_item)


def copies(top_k: float, places: float) -> float:
    """Places (ranks, nodes) among which a token's K experts are found, in the mean, when all are equally likely.

    A dispatcher that sends a token once to a place, however many of its experts are there, moves this many copies
    instead of K (DeepEP, arXiv:2412.19437, section 3.2.2).
    """
    return places * (1.0 - float((1.0 - 1.0 / places) ** top_k))


def tensor_parallel_bytes(tokens: float, hidden: int, group: int, item: float = 2.0) -> float:
    """One transformer layer and micro-batch: two all-reduces of T x H forward and two backward.

    Sequence parallelism replaces each by a reduce-scatter and an all-gather of the same bytes. `tokens` are those of
    the whole group. Source: Megatron-LM (arXiv:1909.08053, section 3), arXiv:2205.05198, section 4.2.2.
    """
    return 4 * 2 * tokens * hidden * item * share(group)


def context_parallel_bytes(tokens: float, key_value_width: int, group: int, item: float = 2.0) -> float:
    """One attention layer and micro-batch: keys and values once round the ring forward, they and gradients backward.

    `tokens` are those of one rank, `key_value_width` is 2 x heads x width. Source: ring attention (arXiv:2310.01889).
    """
    return 3 * tokens * key_value_width * item * (group - 1)


def pipeline_bytes(tokens: float, hidden: int, virtual_stages: int, item: float = 2.0) -> float:
    """One micro-batch: activations to the next stage and gradients to the previous, for each virtual stage."""
    return 2 * virtual_stages * tokens * hidden * item


@dataclass(frozen=True)
class DataParallelBytes:
    """What one rank sends to keep replicas equal."""

    per_step: float
    per_micro_batch: float
    """ZeRO stage 3 gathers weights and scatters gradients in every micro-batch."""


def data_parallel_bytes(
    parameters: float, group: int, zero_stage: int, weight_item: float = 2.0, gradient_item: float = 4.0
) -> DataParallelBytes:
    """Gradients and weights of `parameters` that `group` ranks hold.

    Stage 0: one all-reduce of the gradients. Stages 1, 2: a reduce-scatter of gradients and an all-gather of weights.
    Stage 3: weights gathered forward and backward and gradients scattered, in every micro-batch.
    Source: ZeRO (arXiv:1910.02054, section 7).
    """
    moved = parameters * share(group)
    if zero_stage == 0:
        return DataParallelBytes(2 * moved * gradient_item, 0.0)
    if zero_stage < 3:
        return DataParallelBytes(moved * (gradient_item + weight_item), 0.0)
    return DataParallelBytes(0.0, moved * (2 * weight_item + gradient_item))


def leaves_domain(group: int, domain: int, neighbours: int = 1) -> float:
    """Part of an all-to-all's bytes that crosses the edge of a fast-link domain.

    `neighbours` ranks between two members of the group sit on the same domain (tensor parallel ranks are placed first).
    Partners outside: G - those inside, of G - 1.
    """
    inside = max(1, min(group, domain // neighbours))
    return (group - inside) / (group - 1) if group > 1 else 0.0


def seconds(
    sent: float, group: int, domain: int, link_bytes_per_s: float, network_bytes_per_s: float, neighbours: int = 1
) -> float:
    """Time of an all-to-all whose parts over the fast link and over the network run at the same time."""
    outside = leaves_domain(group, domain, neighbours)
    return max(sent * (1 - outside) / link_bytes_per_s, sent * outside / network_bytes_per_s)


def ring_seconds(
    sent: float, group: int, domain: int, link_bytes_per_s: float, network_bytes_per_s: float, neighbours: int = 1
) -> float:
    """Time of an all-gather, reduce-scatter or all-reduce that is done inside the domains first, then between them.

    Members of one domain send over their own network ports, so a member crosses the edge with 1/inside of the buffer.
    """
    if group == 1:
        return 0.0
    inside = max(1, min(group, domain // neighbours))
    between = -(-group // inside)
    buffer = sent / share(group)
    fast = buffer * share(inside) / link_bytes_per_s
    slow = buffer / inside * share(between) / network_bytes_per_s
    return fast + slow
