"""`bench train`: sides in turns, the same model for everybody, and absent peers as rows."""

from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.forkserver import _forkserver
from typing import Any

import pytest

from hpc.bench import peers
from hpc.bench.train import case, compare, row_line
from hpc.bench.turns import Failed, Side, Turns, serve
from hpc.config.train import Training
from tests import ranks


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """A server with the environment asked for: that of tests/ranks.py, if it runs, was started in another."""
    _forkserver._stop()  # what unit tests have it for
    serve(["hpc.bench.peers"], {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"})
    yield
    _forkserver._stop()
    ranks.SERVER.set_forkserver_preload(list(ranks.LIBRARIES))


def counting(turns: Turns, first: int) -> None:
    """A side without a model: its loss counts its steps."""
    turns.start()
    for number in range(first, first + 100):
        turns.step(number)


def reads_its_environment(turns: Turns, name: str) -> None:
    import os

    turns.start()
    turns.step(float(os.environ[name]))


def lacks_a_library(_turns: Turns, _case: Any) -> None:
    import a_library_that_nobody_has  # noqa: F401


def small(ranks: int = 1) -> peers.Case:
    given = case(4, ranks, quick=True)
    settings = given.settings.model_dump()
    settings["model"].update(hidden_size=32, num_layers=2, expert_size=48)
    settings["batches"].update(seq_len=16, micro_batch_size=2, tokens_per_step=32 * ranks)
    return replace(given, settings=Training.model_validate(settings), vocab_size=64)


@pytest.fixture
def sides() -> Iterator[list[Side]]:
    opened: list[Side] = []
    yield opened
    for side in opened:
        side.close()


def test_sides_take_turns_and_go_on_where_they_were(sides: list[Side]) -> None:
    sides += [Side(counting, 0, 1), Side(counting, 50, 1)]
    assert [side.turn(3).loss for side in sides for _ in range(2)] == [2, 5, 52, 55]


def test_the_environment_is_there_before_the_process_starts(sides: list[Side]) -> None:
    sides.append(Side(reads_its_environment, "MALLOC_ARENA_MAX", 1))
    assert sides[0].turn(1).loss == 1


def test_a_side_that_cannot_run_says_why() -> None:
    with pytest.raises(Failed, match="absent: No module named 'a_library_that_nobody_has'"):
        Side(lacks_a_library, None, 1)


def test_every_peer_trains_the_same_model_and_an_absent_one_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {name: peers.PEERS[name] for name in peers.PEERS if name != "LitGPT"}
    monkeypatch.setattr("hpc.bench.train.PEERS", {**chosen, "absent": lacks_a_library})
    *rows, ours = compare(small(), limit_flops=1e11, rounds=1)
    assert [row.side for row in rows] == [*chosen, "absent"]
    for row in rows[:-1]:
        assert row.loss == pytest.approx(ours.loss, abs=1e-5), row.note
        assert row.ratio
    assert "No module named" in row_line(rows[-1])
