"""`launch.py bench data` where its peers are missing, and where they are there."""

import json
import sys
from importlib.util import find_spec

import pytest

from hpc.bench import data
from hpc.errors import ConfigError
from tests.conftest import Launch


@pytest.mark.parametrize("peer", ["litdata", "grain"])
def test_a_missing_peer_is_told_in_one_line_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch, peer: str) -> None:
    for name in ("litdata", "grain"):
        monkeypatch.setitem(sys.modules, name, None if name == peer else data)
    with pytest.raises(ConfigError, match=rf"bench data needs {peer}: pip install -e '\.\[bench\]'"):
        data.measure(0.1)


@pytest.mark.slow
def test_the_last_line_is_one_json_object_with_the_ratio(launch: Launch) -> None:
    if not (find_spec("litdata") and find_spec("grain")):
        pytest.skip("needs the peers: pip install -e '.[bench]'")
    result = launch("bench", "data", "--seconds", "0.1", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["ratio_best_peer"] == found["tokens_per_s"]["ours"] / max(
        found["tokens_per_s"][side] for side in ("litdata", "grain", "grain, 16 threads")
    )
    assert 0 < found["step_fraction"] < 1
    assert found["seek_s_at_1e10"] > 0
