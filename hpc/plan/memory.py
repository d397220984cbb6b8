"""Bytes per rank of a training stage.

States: ZeRO (arXiv:1910.02054, section 3): weights and gradients at compute precision, fp32 master weights (when the
compute precision is lower) and two Adam moments; stage 1 shards master and moments over data-parallel ranks, stage 2
the gradients too, stage 3 the weights too (the layer at work is gathered). Experts are split over the expert-parallel
group first and sharded over its replicas.
Activations: what autograd keeps for a transformer block without recomputation, counted tensor by tensor below.
"""

from hpc.config import AdapterTraining, Model, Router, TrainingBase
from hpc.plan.params import Parameters, count_adapter


def training_bytes_per_rank(
    model: Model, router: Router, parameters: Parameters, settings: TrainingBase, precision: str
) -> float:
    """Weights, gradients, optimizer states and activations of one rank."""
    item = 4 if precision == "fp32" else 2
    ranks, ep = settings.parallel.world_size, settings.parallel.expert_parallel_size
    weights = item * (parameters.dense + parameters.experts / ep)
    if settings.parallel.zero_stage == 3:
        at_work = (parameters.dense + parameters.experts / ep) / model.num_layers
        weights = item * (parameters.dense / ranks + parameters.experts / ranks + at_work)
    if isinstance(settings, AdapterTraining):
        trained = float(count_adapter(model, router, settings))
        states = _state_bytes(trained, ranks, settings, item)
    else:
        states = _state_bytes(parameters.dense, ranks, settings, item)
        states += _state_bytes(parameters.experts / ep, ranks // ep, settings, item)
    vocab_size = parameters.embedding // model.hidden_size
    return weights + states + activation_bytes(model, router, settings, vocab_size, item)


def _state_bytes(trained: float, replicas: int, settings: TrainingBase, item: int) -> float:
    """Gradients and optimizer states of `trained` parameters that `replicas` ranks hold."""
    master_and_moments = 8 + (4 if item < 4 else 0) + (4 if item == 4 else 0)  # ZeRO keeps an fp32 copy in fp32 too
    gradients = item * trained / (replicas if settings.parallel.zero_stage >= 2 else 1)
    return gradients + master_and_moments * trained / max(1, replicas)


def activation_bytes(model: Model, router: Router, settings: TrainingBase, vocab_size: int, item: int) -> float:
    """Tensors kept for the backward pass of one micro-batch.

    Per token and layer: about 8 of width H (norms, q, k, v, attention output, residuals) and, for each of K experts,
    2 of width H and 4 of width I. Logits three times (logits, log-softmax, gradient), in fp32.
    """
    tokens = settings.batches.micro_batch_size * settings.batches.seq_len
    active = router.top_k + router.num_shared_experts
    block = 8 * model.hidden_size + active * (2 * model.hidden_size + 4 * model.expert_size)
    return float(tokens * (item * model.num_layers * block + 3 * 4 * vocab_size))
