"""Text to tokens on disk, and which tokens a rank sees at a step."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.config import Source
from hpc.data.loader import Loader, permute
from hpc.data.sources import held_out, read_documents
from hpc.data.store import TokenStore, write_store
from hpc.data.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer
from hpc.errors import DataError
from hpc.stages.prepare import unigram_loss


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    write_store(tmp_path / "tokens", [list(range(n, n + 100)) for n in range(0, 1000, 100)], vocab_size=4096)
    return TokenStore(tmp_path / "tokens")


def test_tokens_come_back_as_they_were_written(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [], [4000, 7]]
    assert write_store(tmp_path / "t", documents, 4096) == 5
    store = TokenStore(tmp_path / "t")
    assert store.tokens.tolist() == [1, 2, 3, 4000, 7]
    assert store.lengths.tolist() == [3, 0, 2]
    assert store.tokens.dtype == np.uint16


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    write_store(tmp_path / "t", [[70_000]], 100_000)
    assert TokenStore(tmp_path / "t").tokens.tolist() == [70_000]


def test_the_index_is_megatrons_byte_for_byte(tmp_path: Path) -> None:
    write_store(tmp_path / "t", [[5, 6], [7]], 4096)
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i", 2, 1)
    expected += struct.pack("<2q", 0, 4) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "t.idx").read_bytes() == expected


def test_a_cut_off_store_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "t", [[5, 6], [7]], 4096)
    (tmp_path / "t.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match="does not have the 6 bytes that its index states"):
        TokenStore(tmp_path / "t")
    (tmp_path / "t.idx").write_bytes(b"garbage")
    with pytest.raises(DataError, match="is not a Megatron index file"):
        TokenStore(tmp_path / "t")


@given(count=st.integers(1, 400), key=st.integers(0, 2**70))
def test_the_shuffle_is_a_permutation(count: int, key: int) -> None:
    assert sorted(permute(position, count, key) for position in range(count)) == list(range(count))


def test_the_shuffle_depends_on_its_key_and_is_not_the_identity() -> None:
    orders = [[permute(position, 50, key) for position in range(50)] for key in (1, 2)]
    assert orders[0] != orders[1]
    assert orders[0] != list(range(50))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_tokens_of_a_step_do_not_depend_on_the_number_of_ranks(store: TokenStore, world: int) -> None:
    alone = Loader(store, 16, 8, 1, rank=0, world_size=1, seed=5)
    ranks = [Loader(store, 16, 2, 4 // world, rank=rank, world_size=world, seed=5) for rank in range(world)]
    for step in (0, 3, 20):
        wanted = np.concatenate(alone.micro_batches(step))
        per_rank = [loader.micro_batches(step) for loader in ranks]
        found = np.concatenate([batches[n] for n in range(4 // world) for batches in per_rank])
        assert np.array_equal(wanted, found)


def test_an_epoch_visits_every_window_once_and_the_next_one_in_another_order(store: TokenStore) -> None:
    loader = Loader(store, 16, 1, 1, rank=0, world_size=1, seed=5)
    epochs = [loader.windows(np.arange(62 * e, 62 * (e + 1), dtype=np.uint64)).tolist() for e in range(2)]
    assert loader.num_windows == 62
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(62))
    assert epochs[0] != epochs[1]


def test_inputs_and_targets_overlap_by_all_but_one(store: TokenStore) -> None:
    (batch,) = Loader(store, 16, 2, 1, rank=0, world_size=1, seed=5).micro_batches(0)
    assert batch.shape == (2, 17)
    assert np.array_equal(batch[0], np.arange(batch[0, 0], batch[0, 0] + 17))


def test_too_little_text_for_one_sequence_is_told(store: TokenStore) -> None:
    with pytest.raises(DataError, match="do not fill one sequence of seq_len = 5000"):
        Loader(store, 5000, 1, 1, 0, 1, 0)


def test_documents_come_from_text_jsonl_and_parquet_alike(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "two"}) + "\n\n" + json.dumps({"body": "three"}) + "\n")
    pq.write_table(pa.table({"body": ["four", "five"]}), tmp_path / "c.parquet")
    source = Source(files=[str(tmp_path / "*")], text_key="body")
    assert list(read_documents(source)) == ["one\n", "two", "three", "four", "five"]


def test_a_document_stays_on_its_side_of_the_split() -> None:
    documents = [f"document {number}" for number in range(2000)]
    chosen = {document for document in documents if held_out(document, 0.1)}
    assert 140 < len(chosen) < 260
    assert chosen <= {document for document in documents if held_out(document, 0.2)}


def test_a_trained_tokenizer_gives_every_byte_back(tmp_path: Path) -> None:
    train_tokenizer(["the cat sat on the mat"] * 50, 300, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in ("the mat", "naïve café\n\t ☃", "  two  spaces"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert end_of_text_id(tokenizer, tmp_path) == tokenizer.token_to_id("<|endoftext|>")


def test_the_unigram_loss_is_that_of_smoothed_counts(tmp_path: Path) -> None:
    write_store(tmp_path / "a", [[0, 0, 1]], 300)
    write_store(tmp_path / "b", [[0, 2]], 300)
    expected = -(np.log(3 / 303) + np.log(1 / 303)) / 2
    assert unigram_loss(TokenStore(tmp_path / "a"), TokenStore(tmp_path / "b"), 300) == pytest.approx(expected)
