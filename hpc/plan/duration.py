"""Seconds of one optimizer step of a stage, part by part.

On an accelerator whose data sheet is known: hpc/plan/step_time.py, whose constants were fitted on published runs.
Elsewhere: model FLOPs over the rate of a rank, which is measured where a run or a calibration told it, else the
machine's peak times its expected utilisation; then what is recomputed, what goes through memory once for each
micro-batch and update, and what ranks send each other where the site states bandwidths, as if nothing overlapped.
"""

from dataclasses import replace

from hpc.config import AdapterTraining, Machine, TrainingBase
from hpc.plan.facts import Facts
from hpc.plan.flops import attention_flops_per_token, forward_flops_per_token
from hpc.plan.hardware import find
from hpc.plan.shapes import of_ours
from hpc.plan.step_time import Layout, StepTime
from hpc.plan.step_time import step_time as on_data_sheet
from hpc.plan.traffic import data_parallel_bytes, expert_parallel_bytes, ring_seconds, seconds
from hpc.plan.work import flops_per_token

FP32 = 4
MEMORY_BYTES_PER_S = {"cpu": 8.0e9, "cuda": 1.5e12}
"""Of a rank, where no data sheet says more: a core's share of a server's memory, HBM of the oldest accelerators here;
assumed."""
HOST_BYTES_PER_S = 4.0e9
"""Copying a rank's state for a checkpoint that is written in the background; assumed."""


def step_time(facts: Facts, settings: TrainingBase, machine: Machine, item: int, rate: float | None = None) -> StepTime:
    """One step. rate: measured model FLOP/s of a rank, of `compute` and `recompute` alone. There is no part `exchange`
    where ranks send each other something and the site states no bandwidth for it."""
    if rate is None and machine.accelerator is not None and machine.device == "cuda":
        return _on_accelerator(facts, settings, machine, machine.accelerator)
    rate = rate or machine.peak_flops_per_rank * machine.expected_mfu
    batches = settings.batches
    tokens = batches.tokens_per_step / settings.parallel.world_size
    again = 0.0
    if settings.recompute == "attention":
        again = attention_flops_per_token(facts.model, batches.seq_len)
    elif settings.recompute == "full":
        forward = forward_flops_per_token(facts.model, facts.router, facts.vocab_size, batches.seq_len)
        again = forward - 2.0 * facts.parameters.head
    parts = {"compute": tokens * flops_per_token(facts, settings) / rate, "recompute": tokens * again / rate}
    parts["memory"] = _memory_seconds(facts, settings, machine, item)
    exchange = _exchange_seconds(facts, settings, machine, item)
    return StepTime(parts if exchange is None else {**parts, "exchange": exchange})


def _on_accelerator(facts: Facts, settings: TrainingBase, machine: Machine, name: str) -> StepTime:
    parallel, batches = settings.parallel, settings.batches
    hardware = find(name)
    hardware = replace(
        hardware,
        domain=machine.ranks_per_node,
        link_bytes_per_s=machine.link_bytes_per_s or hardware.link_bytes_per_s,
        network_bytes_per_s=(machine.network_bytes_per_s or 0.0) / machine.ranks_per_node
        or hardware.network_bytes_per_s,
    )
    layout = Layout(
        gpus=parallel.world_size, seq=batches.seq_len, global_batch=batches.tokens_per_step // batches.seq_len,
        micro_batch=batches.micro_batch_size, expert=parallel.expert_parallel_size, zero_stage=parallel.zero_stage,
        recompute={"attention": "selective"}.get(settings.recompute, settings.recompute), eager=True,
    )  # fmt: skip
    found = on_data_sheet(of_ours(facts.model, facts.router, facts.vocab_size), layout, hardware)
    if not isinstance(settings, AdapterTraining):
        return found
    whole = 3 * forward_flops_per_token(facts.model, facts.router, facts.vocab_size, batches.seq_len)
    share = flops_per_token(facts, settings) / whole  # frozen weights take no gradient
    return StepTime({part: value * share for part, value in found.parts.items()})


def _memory_seconds(facts: Facts, settings: TrainingBase, machine: Machine, item: int) -> float:
    """Weights twice and gradients written and added for each micro-batch; for the update weights, gradients, two
    moments and the fp32 copy, read and written."""
    group = settings.parallel.expert_parallel_size
    here = facts.parameters.dense + facts.parameters.experts / group
    trained = 0.0 if isinstance(settings, AdapterTraining) else here
    passes = settings.gradient_accumulation_steps * item * (2 * here + 3 * trained)
    update = (7 * FP32 + 2 * item) * trained * group / settings.parallel.world_size
    return (passes + update) / MEMORY_BYTES_PER_S["cuda" if machine.device == "cuda" else "cpu"]


def _exchange_seconds(facts: Facts, settings: TrainingBase, machine: Machine, item: int) -> float | None:
    parallel = settings.parallel
    if parallel.world_size == 1:
        return 0.0
    domain = parallel.ranks_per_node
    if machine.link_bytes_per_s is None or (parallel.nodes > 1 and machine.network_bytes_per_s is None):
        return None
    link = machine.link_bytes_per_s
    network = (machine.network_bytes_per_s or link * domain) / domain
    group, parameters, router = parallel.expert_parallel_size, facts.parameters, facts.router
    tokens = settings.batches.micro_batch_size * settings.batches.seq_len
    layers = facts.model.num_layers - facts.model.num_dense_layers
    passes = settings.gradient_accumulation_steps
    total = 0.0
    if group > 1:
        sent = expert_parallel_bytes(tokens, facts.model.hidden_size, router.top_k, group, item, item)
        sent *= 1.5 if settings.recompute == "full" else 1.0  # dispatch and combine once more
        total += passes * layers * seconds(sent, group, domain, link, network)
    for count, replicas, neighbours in (
        (parameters.dense, parallel.world_size, 1),
        (parameters.experts / group, parallel.world_size // group, group),
    ):
        if replicas > 1 and not isinstance(settings, AdapterTraining):
            sent_by = data_parallel_bytes(count, replicas, parallel.zero_stage, item, item)
            sent = sent_by.per_step + passes * sent_by.per_micro_batch
            total += ring_seconds(sent, replicas, domain, link, network, min(neighbours, domain))
    return total
