"""What a quantize stage takes: bytes at its fullest, of its own process and the one that a library quantizes in; FLOPs.

Two moments count, the larger one is planned for: while the library quantizes, layer by layer, and while the artifact is
read back beside its source (hpc/shrink/auto_round.py, hpc/stages/quantize.py). Constants are measured where they stand.

Symbols: N parameters, V vocabulary, H hidden size, L layers.
"""

from hpc.config import Quantize
from hpc.plan.facts import Facts
from hpc.plan.memory import Part
from hpc.plan.process import PROCESS_BYTES

MIB = 2**20
LIBRARY_BYTES = 560 * MIB
"""Resident in the process that quantizes a model of no size: auto-round, transformers, torch. Measured."""
PER_ROUNDED = 16
"""Bytes a parameter of the layer in turn under rounding to nearest: measured on 310 M parameters in 12 files of a layer
each, 1,109 MiB in all. A model in fewer files may take more."""
PER_TUNED = 28
"""Bytes a parameter of the layer in turn under SignRound: weights, their rounding and its gradient, what both were at
their best, rounded weights and the same on the way to the file, fp32 each. Two layers of SmolLM2-135M took 861 MiB,
8 % more than planned (measured)."""
SHARD_BYTES = 5e9
"""Packed matrices wait in memory until a file is full: auto-round's max_shard_size."""
PROBED = 512
"""Ids that source and artifact are compared on, of each text."""


def quantize_memory(facts: Facts, stage: Quantize, texts: int) -> tuple[Part, Part]:
    """While the library quantizes, and while the artifact is read back. texts: token sets that the stage needs."""
    total, layers = facts.parameters.total, facts.model.num_layers
    outside = facts.parameters.embedding + facts.parameters.head
    layer = (total - outside) / layers
    bits = stage.bits_per_weight or stage.bits
    packed = min(SHARD_BYTES, (total - outside) * bits / 8)
    each = PER_ROUNDED if stage.method == "rtn" else PER_TUNED
    quantizing = PROCESS_BYTES + LIBRARY_BYTES + packed + 4.0 * outside + each * layer
    how = f"two processes + packed matrices + 4 bytes a parameter outside of the layers + {each} in a layer"
    if stage.method != "rtn":
        quantizing += 3 * 4.0 * facts.model.hidden_size * stage.calibration.most_tokens
        how += " + three times the calibration text between two layers"
    back = PROCESS_BYTES + 8.0 * total + 16.0 * facts.vocab_size * PROBED * max(1, texts)
    return (
        Part("quantizing", quantizing, how),
        Part("reading back", back, "process + 8 N: source and artifact in fp32 + 16 V a compared id"),
    )


def signround_flops(facts: Facts, stage: Quantize) -> float:
    """Of learning to round: each step takes a few windows through one layer, forward and backward, and the calibration
    text goes through each layer three times: in full, rounded, and to cache inputs. 0 for round-to-nearest."""
    if stage.method == "rtn":
        return 0.0
    wanted = stage.calibration
    active = facts.parameters.active_matrices - facts.parameters.head
    steps = wanted.iterations * wanted.batch_size * wanted.seq_len
    return active * (6.0 * steps + 3 * 2.0 * wanted.tokens)
