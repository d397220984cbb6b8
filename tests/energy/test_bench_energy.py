"""`bench energy`: the sampler's own cost, measured on the real process."""

import shutil

import pytest

from hpc.bench.energy import LIMIT, measure, show


def test_the_cost_of_a_sample_is_told_against_the_limit_for_both_kinds_of_node() -> None:
    found = measure(1.5)
    cray, gpus = found["nodes"]
    assert cray["counters"] == ["pm_counters"]
    assert gpus["counters"][:4] == [
        "intel-rapl:0 package-0", "intel-rapl:0:0 dram", "intel-rapl:1 package-1", "intel-rapl:1:0 dram",
    ]  # fmt: skip
    if shutil.which("cc"):
        assert gpus["counters"][4:] == ["gpu0", "gpu1", "gpu2", "gpu3"]
    worst = max(cray["cpu_s_per_sample"], gpus["cpu_s_per_sample"])
    assert worst > 0
    assert found["fraction_of_limit"] == pytest.approx(worst / LIMIT)
    assert 5 < found["peak_rss_mib"] < 500
    assert f"{gpus['cpu_s_per_sample'] / LIMIT:.0%} of the limit" in show(found)
