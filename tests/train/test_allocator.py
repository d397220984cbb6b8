"""Freed memory goes back while weights are loaded, and stays from then on."""

import os
import platform
import subprocess
import sys

import pytest

from tests.conftest import ROOT

HELD = """
import sys
from pathlib import Path
from hpc.train.allocator import give_back_freed_memory, keep_freed_memory

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

def left_after_freeing(mib):
    before = held()
    block = bytearray(b"x") * (mib << 20)
    stays = bytearray(b"x") * 4096  # above the block: the top of the heap is given back in any case
    del block
    return held() - before, stays

told = [left_after_freeing(64)[0]]
give_back_freed_memory()
told.append(left_after_freeing(96)[0])
keep_freed_memory()
told.append(left_after_freeing(128)[0])
print(*told)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(("keeps", "wanted"), [("0", (True, False, True)), ("65536", (False, False, False))])
def test_freed_memory_goes_back_only_while_it_is_asked_for(keeps: str, wanted: tuple[bool, ...]) -> None:
    environment = {**os.environ, "MALLOC_MMAP_MAX_": keeps, "MALLOC_TRIM_THRESHOLD_": str(2**37)}
    result = subprocess.run(
        [sys.executable, "-c", HELD], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    assert tuple(float(mib) > 20 for mib in result.stdout.split()) == wanted
