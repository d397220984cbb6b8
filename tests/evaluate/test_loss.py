"""The held-out loss: which windows it reads, with which positions, and what it makes of the logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hpc.data.store import TokenStore, write_store
from hpc.errors import DataError
from hpc.evaluate.loss import held_out_loss


class Model:
    """Logits that make the loss of a token log(1 + its id) plus a constant; remembers what it was asked."""

    def __init__(self) -> None:
        self.first_ids: list[int] = []
        self.positions: list[list[int]] = []

    def __call__(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        self.first_ids += ids[:, 0].tolist()
        self.positions += [] if positions is None else positions.tolist()
        return torch.log_softmax(-torch.arange(1.0, 301.0).log(), 0).expand(*ids.shape, 300)


@pytest.fixture
def stores(tmp_path: Path) -> list[TokenStore]:
    """Tokens 0-80 in documents of 10 and 100-130 in one: windows of 8 begin with 0, 8, ..., 72 and 100, 108, 116."""
    write_store(tmp_path / "a", [list(range(n, min(n + 10, 81))) for n in range(0, 81, 10)], 300)
    write_store(tmp_path / "b", [list(range(100, 131))], 300)
    return [TokenStore(tmp_path / "a"), TokenStore(tmp_path / "b")]


def test_every_window_of_every_store_counts_once(stores: list[TokenStore]) -> None:
    model = Model()
    loss, tokens = held_out_loss(model, stores, seq_len=8, batch_size=4)
    assert sorted(set(model.first_ids)) == [*range(0, 80, 8), 100, 108, 116]
    assert tokens == 13 * 8
    targets = np.concatenate([np.arange(1, 81), np.arange(101, 125)])
    expected = np.log(targets + 1).mean() + np.log((1 / np.arange(1, 301)).sum())
    assert loss == pytest.approx(expected, rel=1e-6)


def test_positions_start_again_at_documents_unless_masking_is_off(stores: list[TokenStore]) -> None:
    model = Model()
    held_out_loss(model, stores, seq_len=8, batch_size=1)
    assert model.positions[0] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert model.positions[1] == [0, 1, 0, 1, 2, 3, 4, 5]  # tokens 8 and 9, then the document 10-19
    assert model.positions[11] == [0, 1, 2, 3, 4, 5, 6, 7]
    model = Model()
    held_out_loss(model, stores, seq_len=8, batch_size=1, document_masking=False)
    assert model.positions == []


def test_a_part_is_taken_evenly_from_all_over_the_stores(stores: list[TokenStore]) -> None:
    model = Model()
    _, tokens = held_out_loss(model, stores, seq_len=8, batch_size=1, max_tokens=4 * 8 + 7)
    assert model.first_ids == [0, 24, 48, 72]
    assert tokens == 32
    model = Model()
    held_out_loss(model, stores, seq_len=8, batch_size=1, max_tokens=6 * 8)
    assert model.first_ids == [0, 16, 32, 48, 64, 100]


def test_ranks_share_the_windows_and_make_as_many_passes(stores: list[TokenStore]) -> None:
    sums, counts = [], []
    for rank in range(3):
        model = Model()
        loss, tokens = held_out_loss(model, stores, seq_len=8, batch_size=2, rank=rank, world_size=3)
        assert len(model.first_ids) == 6  # 13 windows over 3 ranks of 2: three passes for each
        sums.append(loss * tokens)
        counts.append(tokens)
    whole, tokens = held_out_loss(Model(), stores, seq_len=8, batch_size=4)
    assert sum(counts) == tokens
    assert sum(sums) / sum(counts) == pytest.approx(whole, rel=1e-6)


def test_too_little_text_is_told(stores: list[TokenStore]) -> None:
    with pytest.raises(DataError, match="112 held-out tokens do not fill one sequence of 500"):
        held_out_loss(Model(), stores, seq_len=500, batch_size=1)
