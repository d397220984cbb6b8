"""What glibc's allocator does with memory that is freed: kept for the next step, or given back at once.

Ranks run with MALLOC_MMAP_MAX_=0 (slurm/submit.py): pages that one step freed serve the next one, with no fault each.
While a model is loaded that is wrong: DeepSpeed copies experts and partitions layer by layer, what it frees lies
between what stays, and a rank that keeps half of the experts ends up holding as much as all of them. So large blocks
are mapped one by one until the weights are in (`launch.py bench reuse` measures it), and kept from then on.
"""

import ctypes
import os

M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4
"""Of mallopt(3), from glibc's malloc.h."""
BLOCK = 1 << 20
"""Bytes from which a block is mapped by itself meanwhile."""
MAPPINGS = 65536
"""glibc's own default."""


def give_back_freed_memory() -> None:
    """From now on, where ranks were told to keep it. Call before a model is built."""
    _set({M_MMAP_MAX: MAPPINGS, M_MMAP_THRESHOLD: BLOCK})


def keep_freed_memory() -> None:
    """As ranks were told to at their start. Call when the weights are in."""
    _set({M_MMAP_MAX: 0})


def _set(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and os.environ.get("MALLOC_MMAP_MAX_") == "0":
        for option, value in options.items():
            mallopt(option, value)
