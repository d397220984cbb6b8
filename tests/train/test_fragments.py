"""The state of training cut anywhere and put together in another way."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.errors import ArtifactError
from hpc.train.fragments import ExpertPlace, Fragment, logical_ranges, read_fragments, write_fragments

E, I, H = 4, 3, 5  # noqa: E741
FUSED, W1, W3, W2 = (f"layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "w1", "w3", "w2"))


def cut(name: str, whole: torch.Tensor, edges: list[int]) -> list[Fragment]:
    """A parameter as fragments between edges; its moments are other numbers at the same places."""
    flat = whole.flatten()
    bounds = sorted({0, flat.numel(), *(edge for edge in edges if 0 < edge < flat.numel())})
    return [
        Fragment(name, tuple(whole.shape), a, {"weight": flat[a:b].clone(), "exp_avg": -flat[a:b]})
        for a, b in itertools.pairwise(bounds)
    ]


def empty(name: str, shape: tuple[int, ...], edges: list[int]) -> list[Fragment]:
    return cut(name, torch.full(shape, float("nan")), edges)


def joined(fragments: list[Fragment], value: str) -> torch.Tensor:
    return torch.cat([f.values[value] for f in sorted(fragments, key=lambda f: f.start)]).view(fragments[0].shape)


edges = st.lists(st.integers(1, E * 2 * I * H), max_size=6)


@given(written=edges, read=edges, back=edges)
@settings(max_examples=60, deadline=None)
def test_fused_and_separate_experts_hold_the_same_wherever_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, written: list[int], read: list[int], back: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("a")
    fused = torch.arange(E * 2 * I * H, dtype=torch.float32).view(E, 2 * I, H)
    parts = cut(FUSED, fused, written)
    for rank in range(2):
        write_fragments(folder, rank, parts[rank::2], step=7)
    gate, up = empty(W1, (E, I, H), read), empty(W3, (E, I, H), back)
    assert read_fragments(folder, [*gate, *up]) == 7
    assert torch.equal(joined(gate, "weight"), fused[:, :I])
    assert torch.equal(joined(up, "exp_avg"), -fused[:, I:])
    again = tmp_path_factory.mktemp("b")
    write_fragments(again, 0, [*gate, *up], step=8)
    fresh = empty(FUSED, (E, 2 * I, H), back)
    read_fragments(again, fresh)
    assert torch.equal(joined(fresh, "weight"), fused)


def test_names_of_router_and_down_projection_do_not_depend_on_the_layout() -> None:
    assert next(logical_ranges("l.mlp.router.gate.weight", (8, 4), 3, 2))[:2] == ("l.mlp.gate.weight", 3)
    assert next(logical_ranges("l.mlp.experts.down_proj", (4, 5, 3), 3, 2))[:2] == ("l.mlp.experts.w2", 3)


def test_an_expert_parallel_rank_knows_where_its_experts_are_in_the_whole() -> None:
    place = ExpertPlace(rank=2, size=4)
    assert place.whole(W2, (2, 5, 3)) == ((8, 5, 3), 2 * 30)
    assert place.whole("layers.0.self_attn.q_proj.weight", (5, 5)) == ((5, 5), 0)
    assert place.whole("layers.0.mlp.shared_experts.gate_proj.weight", (5, 5)) == ((5, 5), 0)


@pytest.mark.parametrize("damage", ["missing rank", "other shape", "no moments"])
def test_a_checkpoint_that_lacks_an_element_is_refused(tmp_path: Path, damage: str) -> None:
    whole = torch.randn(6, 4)
    parts = cut("a.weight", whole, [10])
    write_fragments(tmp_path, 0, parts[:1], 1)
    if damage != "missing rank":
        write_fragments(tmp_path, 1, parts[1:], 1)
    wanted = empty("a.weight", (7, 4) if damage == "other shape" else (6, 4), [])
    if damage == "no moments":
        wanted = [
            Fragment(f.name, f.shape, f.start, {**f.values, "exp_avg_sq": f.values["weight"].clone()}) for f in wanted
        ]
    with pytest.raises(ArtifactError, match="has no element"):
        read_fragments(tmp_path, wanted)
