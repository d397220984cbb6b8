"""Sources, tokenizer, and the store of tokens on disk."""

import json
import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest

from hpc.config import Source
from hpc.data.sources import held_out
from hpc.data.store import TokenStore, join_stores, write_store
from hpc.data.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer
from hpc.errors import DataError
from hpc.stages.prepare import unigram_loss
from tests.data.preparation import read_documents


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


INDEX = bytes.fromhex(
    "4d4d4944494458 0000"  # "MMIDIDX", two zero bytes
    "0100000000000000"  # version 1
    "08"  # dtype: uint16
    "0300000000000000"  # three sequences
    "0400000000000000"  # four document boundaries
    "02000000 00000000 01000000"  # lengths: 2, 0, 1
    "0000000000000000 0400000000000000 0400000000000000"  # byte offsets: 0, 4, 4
    "0000000000000000 0100000000000000 0200000000000000 0300000000000000"  # boundaries: 0, 1, 2, 3
)
"""What Megatron's _IndexWriter makes of the documents [5, 258], [], [7], written out by hand."""


def test_the_files_are_megatrons_byte_for_byte(tmp_path: Path) -> None:
    write_store(tmp_path / "t", [[5, 258], [], [7]], 4096)
    assert (tmp_path / "t.idx").read_bytes() == INDEX
    assert (tmp_path / "t.bin").read_bytes() == bytes.fromhex("0500 0201 0700")


@pytest.mark.parametrize(("code", "name"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_every_whole_number_type_of_megatron_is_read(tmp_path: Path, code: int, name: str) -> None:
    size = np.dtype(name).itemsize
    index = bytearray(INDEX)
    index[17] = code
    struct.pack_into("<3q", index, 34 + 12, 0, 2 * size, 2 * size)
    (tmp_path / "t.idx").write_bytes(bytes(index))
    (tmp_path / "t.bin").write_bytes(np.array([5, 100, 7], name).tobytes())
    store = TokenStore(tmp_path / "t")
    assert store.tokens.tolist() == [5, 100, 7]
    assert store.document_starts(0, 3) == [0, 2, 2]


def test_documents_of_several_sequences_start_where_megatron_says(tmp_path: Path) -> None:
    write_store(tmp_path / "t", [[1, 2], [3], [4, 5, 6], [7]], 4096)
    index = (tmp_path / "t.idx").read_bytes()
    boundaries = struct.pack("<3q", 0, 3, 4)  # two documents: the first three sequences, and the last one
    count = struct.pack("<Q", 3)
    (tmp_path / "t.idx").write_bytes(index[:26] + count + index[34 : 34 + 4 * 12] + boundaries + b"\0" * 4)
    store = TokenStore(tmp_path / "t")
    assert store.num_documents == 2
    assert store.document_starts(0, 7) == [0, 6]
    assert store.document_starts(1, 6) == []


def test_more_stores_are_joined_than_files_may_be_open(tmp_path: Path) -> None:
    parts = [tmp_path / f"part-{number}" for number in range(60)]
    for number, part in enumerate(parts):
        write_store(part, [[number]], 300)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        join_stores(tmp_path / "joined", parts)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert TokenStore(tmp_path / "joined").tokens.tolist() == list(range(60))


def test_joined_stores_are_the_store_of_all_documents(tmp_path: Path) -> None:
    documents = [[[1, 2], []], [], [[3]], [[4, 5, 6]]]
    for number, part in enumerate(documents):
        write_store(tmp_path / f"part-{number}", part, 100_000)
    join_stores(tmp_path / "joined", [tmp_path / f"part-{number}" for number in range(4)])
    write_store(tmp_path / "whole", [document for part in documents for document in part], 100_000)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"joined{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_a_cut_off_store_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "t", [[5, 6], [7]], 4096)
    (tmp_path / "t.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match="does not have the 6 bytes that its index states"):
        TokenStore(tmp_path / "t")
    (tmp_path / "t.idx").write_bytes(b"garbage")
    with pytest.raises(DataError, match="is not a Megatron index file"):
        TokenStore(tmp_path / "t")


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
