"""Which tokens a rank sees at a step: order, mixture, positions, and how fast any step is found."""

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc.data.loader import Loader, Share, cut, epochs, num_windows
from hpc.data.mixture import Schedule
from hpc.data.permutation import permute
from hpc.data.store import TokenStore, write_store
from hpc.errors import DataError


def numbers(count: int, first: int = 0) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    return np.arange(first, first + count, dtype=np.uint64)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    write_store(tmp_path / "tokens", [list(range(n, n + 100)) for n in range(0, 1000, 100)], vocab_size=4096)
    return TokenStore(tmp_path / "tokens")


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Share, ...]:
    """Three sources that can be told apart by their tokens: 0-, 10,000- and 20,000-."""
    shares = []
    for number, (size, weight) in enumerate([(700, 0.6), (200, 0.3), (3000, 0.1)]):
        documents = [[number * 10_000 + token for token in range(first, first + 50)] for first in range(0, size, 50)]
        write_store(tmp_path / f"source-{number}", documents, vocab_size=40_000)
        shares.append(Share(f"source-{number}", TokenStore(tmp_path / f"source-{number}"), weight))
    return tuple(shares)


@settings(deadline=None)
@given(count=st.integers(1, 700), key=st.integers(0, 2**70))
def test_the_shuffle_is_a_permutation(count: int, key: int) -> None:
    assert sorted(permute(numbers(count), count, key).tolist()) == list(range(count))


def test_a_number_has_the_same_place_in_any_array() -> None:
    count = 10**10 + 7
    some = np.array([[0, count - 1], [123_456_789, 9_876_543_210]], np.uint64)
    places = permute(some, count, 5, 1)
    assert places.shape == (2, 2)
    assert (places < count).all()
    for value, place in zip(some.ravel(), places.ravel(), strict=True):
        assert permute(np.array([value]), count, 5, 1)[0] == place


def test_shuffles_of_different_keys_agree_no_more_than_chance_has_it() -> None:
    count = 100_003
    orders = [permute(numbers(count), count, 1, source, epoch) for source in (0, 1) for epoch in (0, 1)]
    for one in range(4):
        assert (orders[one] == numbers(count)).sum() < 12  # a random permutation has one fixed point on average
        steps = np.diff(orders[one].astype(np.int64))
        assert abs(np.corrcoef(orders[one][:-1], orders[one][1:])[0, 1]) < 0.02
        assert len(np.unique(steps)) > 0.6 * count
        for other in range(one):
            assert (orders[one] == orders[other]).sum() < 12


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_tokens_of_a_step_do_not_depend_on_the_number_of_ranks(mixed: tuple[Share, ...], world: int) -> None:
    alone = Loader(mixed, 16, 8, 1, rank=0, world_size=1, seed=5)
    ranks = [Loader(mixed, 16, 2, 4 // world, rank=rank, world_size=world, seed=5) for rank in range(world)]
    for step in (0, 3, 20):
        (wanted,) = alone.micro_batches(step)
        per_rank = [loader.micro_batches(step) for loader in ranks]
        found = [batches[n] for n in range(4 // world) for batches in per_rank]
        assert np.array_equal(wanted.ids, np.concatenate([batch.ids for batch in found]))
        assert np.array_equal(wanted.positions, np.concatenate([batch.positions for batch in found]))


def test_an_epoch_visits_every_window_once_and_the_next_one_in_another_order(store: TokenStore) -> None:
    loader = Loader((Share("text", store),), 16, 1, 1, rank=0, world_size=1, seed=5)
    orders = [loader.windows(numbers(62, 62 * epoch))[1].tolist() for epoch in range(2)]
    assert num_windows(store, 16) == 62
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(62))
    assert orders[0] != orders[1]
    across = loader.windows(numbers(62, 31))[1].tolist()
    assert across == orders[0][31:] + orders[1][:31]


def test_two_sources_of_the_same_size_are_read_in_different_orders(store: TokenStore) -> None:
    loader = Loader((Share("one", store, 0.5), Share("two", store, 0.5)), 16, 1, 1, rank=0, world_size=1, seed=5)
    sources, windows = loader.windows(numbers(124))
    one, two = (windows[sources == number].tolist() for number in (0, 1))
    assert sorted(one) == sorted(two) == list(range(62))
    assert one != two


def test_each_source_of_a_mixture_has_epochs_of_its_own(mixed: tuple[Share, ...]) -> None:
    loader = Loader(mixed, 16, 1, 1, rank=0, world_size=1, seed=5)
    sources, windows = loader.windows(numbers(3000))
    for number, share in enumerate(mixed):
        count = num_windows(share.store, 16)
        order = windows[sources == number].tolist()
        for first in range(0, len(order) - count + 1, count):
            assert sorted(order[first : first + count]) == list(range(count))
    for step in (0, 7, 1234):
        (batch,) = loader.micro_batches(step)
        assert batch.ids[0, 0] // 10_000 == sources[step]
        assert batch.ids[0, 0] % 10_000 == 16 * windows[step]
    assert epochs(mixed, 16, 3000) == {
        "source-0": 1800 / 43, "source-1": 900 / 12, "source-2": 300 / 187,
    }  # fmt: skip


@settings(deadline=None)
@example(parts=[8, 40, 40, 40, 1], first=0)  # serving the one that is owed most would miss the bound
@given(parts=st.lists(st.integers(1, 40), min_size=1, max_size=6), first=st.integers(0, 10**12))
def test_any_first_samples_are_within_one_of_their_weights(parts: list[int], first: int) -> None:
    weights = [part / 8 for part in parts]
    schedule, total = Schedule(weights), sum(parts)
    sources, before = schedule.draw(numbers(3 * total))
    given_so_far = [0] * len(parts)
    for count in range(3 * total + 1):
        assert given_so_far == schedule.counts(count)
        for number, part in enumerate(parts):
            assert abs(given_so_far[number] * total - part * count) < total
        if count < 3 * total:
            assert before[count] == given_so_far[sources[count]]
            given_so_far[sources[count]] += 1
    later, _ = schedule.draw(numbers(total, first))
    assert np.bincount(later, minlength=len(parts)).tolist() == [part * total // sum(parts) for part in parts]


def test_decimal_weights_are_taken_as_they_are_written() -> None:
    schedule = Schedule([0.7, 0.3])
    assert len(schedule.table) == 10
    assert schedule.counts(10**10) == [7 * 10**9, 3 * 10**9]
    assert Schedule([2, 1]).counts(10**10 + 1) in ([6666666667, 3333333334], [6666666668, 3333333333])
    assert len(Schedule([0.3333, 0.3333, 0.3334]).table) == 10_000
    with pytest.raises(ValueError, match=f"repeat only after {10**9:,} sequences"):
        Schedule([0.123456789, 0.876543211])


def test_inputs_and_targets_overlap_by_all_but_one(store: TokenStore) -> None:
    (batch,) = Loader((Share("text", store),), 16, 2, 1, rank=0, world_size=1, seed=5).micro_batches(0)
    assert batch.ids.shape == (2, 17)
    assert batch.ids.dtype == np.int64
    assert np.array_equal(batch.ids[0], np.arange(batch.ids[0, 0], batch.ids[0, 0] + 17))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40), seq_len=st.integers(1, 12))
def test_positions_start_again_at_every_document(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int
) -> None:
    prefix = tmp_path_factory.mktemp("store", numbered=True) / "t"
    write_store(prefix, [[0] * length for length in lengths], 300)  # no token tells where a document ends
    store = TokenStore(prefix)
    windows = list(range(num_windows(store, seq_len)))
    if not windows:
        return
    starts = {sum(lengths[:number]) for number in range(len(lengths))}
    batch = cut([(store, window) for window in windows], seq_len, document_masking=True)
    for row, window in enumerate(windows):
        wanted, position = [], 0
        for token in range(window * seq_len, (window + 1) * seq_len):
            position = 0 if token in starts else position
            wanted.append(position)
            position += 1
        assert batch.positions is not None
        assert batch.positions[row].tolist() == wanted
    assert cut([(store, 0)], seq_len, document_masking=False).positions is None


def test_too_little_text_for_one_sequence_is_told(store: TokenStore) -> None:
    with pytest.raises(DataError, match="text: 1,000 training tokens do not fill one sequence of seq_len = 5000"):
        Loader((Share("text", store),), 5000, 1, 1, 0, 1, 0)


def test_any_of_ten_thousand_million_samples_is_found_at_once(tmp_path: Path) -> None:
    """Exactness here; `launch.py bench data` measures the time. The store is a file without content, 320 GB long."""
    from hpc.bench.data import LARGE_SEQ_LEN, LARGE_WINDOWS, write_large_store

    store = TokenStore(write_large_store(tmp_path))
    assert num_windows(store, LARGE_SEQ_LEN) >= LARGE_WINDOWS
    share = (Share("large", store),)
    one = Loader(share, LARGE_SEQ_LEN, 4, 2, rank=3, world_size=4, seed=1)
    step = LARGE_WINDOWS // 32 - 1
    began = time.monotonic()
    batches = one.micro_batches(step)
    assert time.monotonic() - began < 5, "it reads or computes more than one step"
    assert [batch.ids.shape for batch in batches] == [(4, LARGE_SEQ_LEN + 1)] * 2
    all_ranks = Loader(share, LARGE_SEQ_LEN, 32, 1, rank=0, world_size=1, seed=1)
    samples = numbers(32, 32 * step)
    assert np.array_equal(
        all_ranks.windows(samples)[1].reshape(2, 4, 4)[:, 3], one.windows(samples.reshape(2, 4, 4)[:, 3])[1]
    )
