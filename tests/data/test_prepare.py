"""Preparation: formats, several processes, a kill in the middle, memory that does not grow with the text."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpc.config import Source
from hpc.data import shards, sources
from hpc.data.shards import Packing, default_workers, pack
from hpc.data.sources import chunks, held_out, read_chunk, training_texts
from hpc.data.store import TokenStore
from hpc.data.tokenizer import load_tokenizer, train_tokenizer
from hpc.errors import DataError
from tests.conftest import ROOT
from tests.data.preparation import prepared, read_documents

WORDS = ("river", "commerce", "congress", "naïve", "treaty", "war", "peace", "harvest", "☃", "union")


def text(number: int, size: int) -> str:
    """Words that differ from document to document."""
    return f"{number}. " + " ".join(WORDS[(number * 7 + place * place) % 10] for place in range(size)) + "\n"


def write_jsonl(path: Path, documents: list[str], key: str = "text") -> str:
    path.write_text("".join(json.dumps({key: document}, ensure_ascii=False) + "\n" for document in documents))
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """1.3 MB in one JSONL file (several chunks), a compressed one and a Parquet file of several row groups."""
    folder = tmp_path_factory.mktemp("corpus")
    names = [write_jsonl(folder / "a.jsonl", [text(n % 700, 20 + n % 300) for n in range(1400)])]
    compressed = folder / "b.jsonl.zst"
    with pa.output_stream(str(compressed), compression="zstd") as file:
        file.write(Path(write_jsonl(folder / "plain", [text(n, 100) for n in range(700, 800)])).read_bytes())
    pq.write_table(
        pa.table({"text": [text(n, 100) for n in range(800, 1000)]}), folder / "c.parquet", row_group_size=90
    )
    return [*names, str(compressed), str(folder / "c.parquet")]


def files_of(folder: Path) -> dict[str, bytes]:
    artifact = folder / "stages/text/artifact"
    return {str(path.relative_to(artifact)): path.read_bytes() for path in artifact.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def alone(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the corpus."""
    folder = tmp_path_factory.mktemp("alone")
    metrics = prepared(folder, 1, corpus)
    assert metrics["chunks"] > 8
    assert metrics["documents_train"] + metrics["documents_held_out"] == 1700
    return folder


def test_tokens_decode_to_the_documents_in_their_order(alone: Path, corpus: list[str]) -> None:
    documents = [document for name in corpus for document in read_documents(Source(files=[name]))]
    assert documents == [text(n % 700, 20 + n % 300) for n in range(1400)] + [text(n, 100) for n in range(700, 1000)]
    tokenizer = load_tokenizer(alone / "stages/text/artifact/tokenizer")
    for part, is_held_out in (("train", False), ("held_out", True)):
        wanted = [document for document in documents if held_out(document, 0.2) == is_held_out]
        store = TokenStore(alone / "stages/text/artifact" / part)
        assert tokenizer.decode(store.tokens.tolist(), skip_special_tokens=False) == "".join(
            document + "<|endoftext|>" for document in wanted
        )
        assert len(store.lengths) == len(wanted)


def test_a_killed_prepare_goes_on_where_it_was_and_ends_with_the_same_bytes(
    alone: Path, corpus: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.data.preparation", str(tmp_path), "2", *corpus]
    killed = subprocess.Popen(command, cwd=ROOT)
    packed = tmp_path / "stages/text/shards/packed"
    deadline = time.monotonic() + 60
    while sum(1 for _ in packed.glob("0*/shard.json")) < 2:
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = psutil.Process(killed.pid).children(recursive=True)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=10)[1] == [], "a worker outlived its parent"
    left = sum(1 for _ in packed.glob("0*/shard.json"))
    damaged = next(packed.glob("0*/train.bin"))
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])

    metrics = prepared(tmp_path, 2, corpus)
    assert 1 <= metrics["chunks_reused"] == left - 1 < metrics["chunks"]
    assert files_of(tmp_path) == files_of(alone)
    progress = json.loads((tmp_path / "stages/text/progress.json").read_text())
    assert progress["text"] == "unigram model"


def test_progress_counts_bytes_up_to_all_of_them(corpus: list[str], tmp_path: Path) -> None:
    train_tokenizer([text(1, 300)], 300, tmp_path / "tokenizer")
    found = chunks([Source(files=corpus)])
    packing = Packing(tmp_path / "packed", tmp_path / "tokenizer", 0.2)
    told: list[tuple[int, int]] = []
    assert pack(packing, found, 1, lambda done, before: told.append((done, before))).reused == 0
    total = sum(chunk.size_bytes for chunk in found)
    assert told[0] == (0, 0)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, 0)
    assert pack(packing, found, 1, lambda done, before: told.append((done, before))).reused == len(found)
    assert told[-1] == (total, total)


def test_a_changed_file_or_split_makes_its_shards_again(tmp_path: Path) -> None:
    train_tokenizer([text(1, 300)], 300, tmp_path / "tokenizer")
    name = write_jsonl(tmp_path / "a.jsonl", [text(n, 10) for n in range(20)])
    packing = Packing(tmp_path / "packed", tmp_path / "tokenizer", 0.2)

    def reused(packing: Packing) -> int:
        return pack(packing, chunks([Source(files=[name])]), 1, lambda *_: None).reused

    assert reused(packing) == 0
    assert reused(packing) == 1
    assert reused(Packing(packing.folder, packing.tokenizer, 0.3)) == 0
    os.utime(name, ns=(1, 1))
    assert reused(Packing(packing.folder, packing.tokenizer, 0.3)) == 0
    assert len(list(packing.folder.iterdir())) == 1


def test_chunks_of_any_size_hold_every_document_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [text(n, n % 13) for n in range(60)]
    name = write_jsonl(tmp_path / "a.jsonl", documents)
    Path(name).write_bytes(Path(name).read_bytes().rstrip(b"\n"))  # the last line may lack its end
    line = len(json.dumps({"text": documents[0]}, ensure_ascii=False).encode()) + 1
    for limit in (1, 7, line, line + 1, 1000, 10**6):
        monkeypatch.setattr(sources, "CHUNK_BYTES", limit)
        found = chunks([Source(files=[name])])
        assert [document for chunk in found for document in read_chunk(chunk)] == documents
        assert sum(chunk.size_bytes for chunk in found) == Path(name).stat().st_size


def test_texts_for_the_tokenizer_come_from_everywhere_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 10_000)
    name = write_jsonl(tmp_path / "a.jsonl", [text(n, 30) for n in range(1000)])
    found = chunks([Source(files=[name])])
    some = list(training_texts(found, 0.1, 40_000))
    assert 36_000 < sum(len(document.encode()) for document in some) < 40_000 + 300 * len(found)
    assert int(some[-1].split(".")[0]) > 900
    assert not any(held_out(document, 0.1) for document in some)
    assert len(list(training_texts(found, 0.1, 10**9))) == sum(not held_out(text(n, 30), 0.1) for n in range(1000))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_bad_line_in_the_middle_is_named_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 50)
    lines = b'{"text": "fine"}\n' * 30 + b'{"title": "no text"}\n' + b'{"text": "fine"}\n' * 30
    path = tmp_path / ("a.jsonl.zst" if compressed else "a.jsonl")
    with pa.output_stream(str(path), compression="zstd" if compressed else None) as file:
        file.write(lines)
    with pytest.raises(DataError, match=r"a\.jsonl(\.zst)?:31: not a JSON object with the field 'text'"):
        list(read_documents(Source(files=[str(path)])))


def test_a_cut_off_compressed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(b'{"text": "fine"}\n' * 1000)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst cannot be read .* that it is whole"):
        list(read_documents(Source(files=[str(path)])))


def test_an_error_in_a_worker_process_is_the_users_error(tmp_path: Path, corpus: list[str]) -> None:
    train_tokenizer([text(1, 300)], 300, tmp_path / "tokenizer")
    (tmp_path / "bad.jsonl").write_text('{"text": "half a pair: \\ud83d"}\n')
    found = chunks([Source(files=[corpus[0]]), Source(files=[str(tmp_path / "bad.jsonl")])])
    with pytest.raises(DataError, match=r"'half a pair: .' holds half of a surrogate pair"):
        pack(Packing(tmp_path / "packed", tmp_path / "tokenizer", 0.2), found, 2, lambda *_: None)


def test_workers_follow_the_cpus_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for threads, wanted in (("1", 12), ("", 12), ("8", 8), ("64", 12)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert default_workers() == wanted


class Text(str):
    """A text whose life can be watched."""


def test_no_more_text_is_held_than_two_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Text] = weakref.WeakSet()
    most = 0

    def documents(_: object) -> Iterator[str]:
        nonlocal most
        for number in range(1000):
            document = Text(text(number, 20))
            alive.add(document)
            most = max(most, len(alive))
            yield document

    monkeypatch.setattr(shards, "read_chunk", documents)
    monkeypatch.setattr(shards, "ENCODE_BYTES", 5000)  # about 40 documents
    train_tokenizer([text(1, 300)], 300, tmp_path / "tokenizer")
    found = chunks([Source(files=[write_jsonl(tmp_path / "a.jsonl", ["seen only by its size"])])])
    packed = pack(Packing(tmp_path / "packed", tmp_path / "tokenizer", 0.2), found, 1, lambda *_: None)
    assert packed.counts("train").documents + packed.counts("held_out").documents == 1000
    assert 20 < most < 100
