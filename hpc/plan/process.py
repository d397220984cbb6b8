"""What a rank on a CPU takes besides its tensors: the process itself, compiled kernels, and holes in the heap.

All constants are measured, with torch 2.13, DeepSpeed 0.19.8 and glibc 2.36 under the environment of ranks
(slurm/submit.py), on a processor with AVX-512; `hpc/bench/step.py` measures them again.
"""

from hpc.config import AdapterTraining, Model, Router, TrainingBase

MIB = 2**20
PROCESS_BYTES = 365 * MIB
"""Resident after the libraries are imported and the process group is joined."""
ADAPTER_LIBRARY_BYTES = 54 * MIB
"""peft, and bitsandbytes where it is installed: what a process that trains adapters has loaded besides."""
ADAPTER_HOLES_BYTES = 65 * MIB
"""Holes of its heap beyond `HEAP_SLACK`: adapters take experts' rows in whatever number they come, and what one number
frees fits no other. Measured on the quickstart's adapters: 68 to 74 MiB, on a base in four bits 42 to 76."""
KERNEL_BYTES = 0.57 * MIB
"""Of one matrix product that oneDNN has compiled: two code buffers of 256 KiB and their descriptors."""
MOST_KERNELS = 1024
"""oneDNN keeps as many."""
FIXED_KERNELS = 60
"""Products whose shapes do not depend on routing: attention, head, rotary embedding, in both directions."""
HEAP_SLACK = 1.3
"""Resident heap over heap in use, at the end of a stage: freed memory is kept (it is slow to get again) and kernels
that stay lie scattered in it."""
SMALL_ROWS, GRAIN = 63, 32
"""Row counts are padded to at most 32 between a power of two and its double, from 64 on (hpc/model/products.py)."""


HALF = 0.9
"""Half of all row counts have occurred once so many experts' batches were computed, over all row counts: measured on
the quickstart's first 150 steps (44 % after 160, 83 % after 800, 91 % after 1,600)."""


def kernel_bytes(model: Model, router: Router, settings: TrainingBase, precision: str, load: float) -> float:
    """Kernels at the end of a stage: one for each row count that an expert got, and each of its products.

    Elsewhere than in fp32 on AVX-512 there are none (hpc/model/products.py); which processor the ranks will have is
    not known here, and AVX-512 is assumed.
    """
    if precision != "fp32":
        return 0.0
    tokens = settings.batches.micro_batch_size * settings.batches.seq_len
    group = settings.parallel.expert_parallel_size
    rows = tokens * min(group, load * router.top_k)  # all tokens of the group choose one expert of this rank
    possible = row_counts(int(min(rows, tokens * group)))
    passes = settings.steps * settings.gradient_accumulation_steps
    visits = passes * (model.num_layers - model.num_dense_layers) * router.num_experts // group
    counts = possible * visits / (visits + HALF * possible)
    is_square = model.hidden_size == model.expert_size
    products = (3 if is_square else 6) if group > 1 else 6
    if isinstance(settings, AdapterTraining):  # torch's own products, but for matrices unpacked from four bits
        products = 0 if settings.base_bits is None else (2 if is_square else 4)
    return KERNEL_BYTES * min(MOST_KERNELS, FIXED_KERNELS + counts * products)


def row_counts(most: int) -> int:
    """Different padded row counts from 1 to `most`."""
    counts, first = min(most, SMALL_ROWS), SMALL_ROWS + 1
    while first <= most:
        last = min(most, 2 * first - 1)
        counts += -(-(last - first + 1) * GRAIN // first)
        first *= 2
    return counts
