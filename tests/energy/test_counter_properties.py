"""Whatever happens to a source, its counter never shows more than was drawn, and says and bounds what it did not see.

A story of draws, wraps, restarts, suspended samplers and files that are missing, empty, cut, or unreadable is played on
a fake of each source, in which the true energy is known. A file that became a folder stands for every failing read: it
fails for root as well, whom no file mode stops (a real "permission denied" is in test_counters.py).
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc.bench.fake_node import cray, rapl
from hpc.energy.counters import amd_smi, discover
from hpc.energy.counters.base import MAX_PLAUSIBLE_W, Counter, Part
from hpc.energy.counters.cover import ORDER, cover, overlap
from tests.energy.test_gpu_counters import AmdModule, NvmlModule


class Event(NamedTuple):
    """Some seconds, what was drawn in them, and what else happened at their end."""

    kind: Literal["draw", "restart", "missing", "folder", "empty", "garbage"]
    watts: int
    seconds: int
    rest: int = 1
    """Seconds after a restart."""


def events(longest: int) -> st.SearchStrategy[list[Event]]:
    kinds = st.sampled_from(["draw", "draw", "draw", "restart", "missing", "folder", "empty", "garbage"])
    seconds = st.integers(1, 3) | st.integers(1, longest)
    return st.lists(st.builds(Event, kinds, st.integers(0, 2900), seconds, st.integers(1, 3)), min_size=1, max_size=25)


class Source:
    """A fake counter whose raw figure is set in joules."""

    range_j: int | None = None
    has_epoch = False

    def __init__(self, root: Path) -> None:
        self.root = root

    def show(self, joules: int) -> None: ...
    def restarted(self) -> None: ...
    def hide(self, how: str) -> None: ...

    def find(self) -> Counter:
        (counter,) = discover(None, self.root).counters
        return counter


class FileSource(Source):
    """One that is a file."""

    file: Path

    def set(self, text: str) -> None:
        if self.file.is_dir():
            self.file.rmdir()
        self.file.write_text(text)

    def hide(self, how: str) -> None:
        self.set({"garbage": "12x4 J"}.get(how, ""))
        if how in ("folder", "missing"):
            self.file.unlink()
        if how == "folder":
            self.file.mkdir()


class Rapl(FileSource):
    range_j: int = 65_536

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.file = rapl(root, "0", "package-0", 0, self.range_j * 10**6) / "energy_uj"

    def show(self, joules: int) -> None:
        self.set(f"{joules * 10**6}")


class Cray(FileSource):
    has_epoch = True

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.file = cray(root, 0, startup=0) / "energy"
        self.starts = self.freshness = 0

    def show(self, joules: int) -> None:
        self.set(f"{joules} J 17 us")
        self.freshness += 1
        self.file.with_name("freshness").write_text(f"{self.freshness}")

    def restarted(self) -> None:
        self.starts += 1
        self.file.with_name("startup").write_text(f"{self.starts}")


class Nvml(Source):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.library = NvmlModule("NVIDIA H100")
        sys.modules["pynvml"] = self.library

    def show(self, joules: int) -> None:
        self.library.lacking = ()
        self.library.joules[0] = joules

    def hide(self, how: str) -> None:
        self.library.lacking = (0,)


class Amd(Source):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        (root / amd_smi.DRIVER).mkdir(parents=True)
        self.library = AmdModule(("AMD Instinct MI300X", 10**9))
        sys.modules["amdsmi"] = self.library

    def show(self, joules: int) -> None:
        # 0 is no value, so this counter begins with one unit
        self.library.devices[0] = ("AMD Instinct MI300X", joules * 1e6 / 15.3 + 1)

    def hide(self, how: str) -> None:
        self.library.devices[0] = ("AMD Instinct MI300X", {"empty": None, "garbage": "N/A"}.get(how, 0))


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "amdsmi", None)


class Clock:
    """time.monotonic, moved by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def on(make: Callable[[Path], Source], story: list[Event], first_j: int) -> None:
    """Play a story on a fresh tree."""
    root, clock = Path(tempfile.mkdtemp()), Clock()
    try:
        with mock.patch("time.monotonic", clock):
            play(make(root), clock, story, first_j)
    finally:
        shutil.rmtree(root)


def play(source: Source, clock: Clock, story: list[Event], first_j: int) -> None:
    raw, true_j, last_raw, last_time, is_exact, told, shown = first_j, 0, first_j, clock.now, True, 0, 0.0
    source.show(raw)
    counter = source.find()
    limit_w = MAX_PLAUSIBLE_W[counter.scope]
    for event in story:
        clock.now += event.seconds
        drawn = event.watts * event.seconds
        hidden = event.kind in ("missing", "folder", "empty", "garbage")
        if event.kind == "restart" and may_restart(source, raw, last_raw, event, clock.now - last_time, limit_w):
            clock.now += event.rest
            raw = event.watts * event.rest
            true_j += drawn + raw
            source.restarted()
            is_exact = False
        else:
            raw, true_j = raw + drawn, true_j + drawn
            if source.range_j:
                raw %= source.range_j
        if hidden:
            source.hide(event.kind)
        else:
            source.show(raw)
            # what a slow reader of a counter that wraps cannot know
            is_exact = is_exact and not (source.range_j and (clock.now - last_time + 0.2) * limit_w >= source.range_j)
            last_raw, last_time = raw, clock.now
        reading = counter.read()
        assert reading.energy_j is not None
        assert reading.energy_j >= shown, "energy never falls"
        assert reading.energy_j <= true_j + 1e-3, "more than was drawn"
        shown, told = reading.energy_j, told + len(reading.notes)
        if hidden:
            assert reading.stale_s == clock.now - last_time
            continue
        assert reading.stale_s == 0
        assert true_j <= reading.energy_j + reading.unsure_j + 1e-3, "what was not seen is bounded"
        assert reading.unsure_j == 0 or told, "what is bounded is also said"
        if is_exact:
            assert reading.energy_j == pytest.approx(true_j, abs=1e-3)
            assert reading.unsure_j == 0


def may_restart(source: Source, raw: int, last_raw: int, event: Event, since_s: float, limit_w: float) -> bool:
    """Whether this restart can be told at all from something else.

    Without an epoch a counter that passed its old value again looks as if it had gone on (nobody can tell); one that
    wraps and restarts near the end of its range looks like a wrap.
    """
    after = event.watts * event.rest
    if source.has_epoch:
        return True
    if after >= last_raw:
        return False
    return source.range_j is None or after - last_raw + source.range_j > limit_w * (since_s + event.rest + 0.2)


@pytest.mark.parametrize("make", [Rapl, Cray, Nvml, Amd], ids=lambda make: make.__name__)
def test_no_story_makes_a_counter_show_more_than_was_drawn_or_hide_what_it_missed(
    make: Callable[[Path], Source],
) -> None:
    @settings(max_examples=40, deadline=None)
    @given(story=events(longest=1500), first_j=st.integers(0, 65_000))
    @example(story=[Event("draw", 400, 2), Event("folder", 400, 1200), Event("draw", 400, 1)], first_j=60_000)
    @example(story=[Event("draw", 400, 200)] * 4, first_j=60_000)
    @example(story=[Event("draw", 900, 3), Event("restart", 100, 2), Event("draw", 900, 3)], first_j=60_000)
    def check(story: list[Event], first_j: int) -> None:
        on(make, story, first_j)

    check()


@pytest.mark.parametrize("make", [Rapl, Cray], ids=lambda make: make.__name__)
def test_at_the_samplers_pace_every_joule_is_counted_through_any_number_of_wraps(
    make: Callable[[Path], Source],
) -> None:
    @settings(max_examples=8, deadline=None)
    @given(watts=st.lists(st.integers(0, 2900), min_size=50, max_size=70), first_j=st.integers(0, 65_000))
    def check(watts: list[int], first_j: int) -> None:
        on(make, [Event("draw", each, 1) for each in watts], first_j)

    check()


# The cover rule


class Named(NamedTuple):
    name: str
    scope: Any
    parts: frozenset[Part]
    unit: str = "J"


PARTS = st.builds(
    Part,
    st.sampled_from(["cpu", "dram", "sysio", "gpu", "rest"]),
    st.none() | st.integers(0, 3),
    st.sampled_from(["", "a", "b"]),
)
COUNTERS = st.lists(
    st.builds(
        Named,
        st.text("abc", min_size=1, max_size=3),
        st.sampled_from(ORDER),
        st.frozensets(PARTS, min_size=1, max_size=4),
        st.sampled_from(["J", "uW"]),
    ),
    max_size=8,
)


@given(found=COUNTERS)
def test_what_is_added_never_overlaps_and_what_is_left_out_always_would(found: list[Named]) -> None:
    taken, notes = cover(found)
    for place, counter in enumerate(taken):
        assert not any(overlap(counter.parts, other.parts) for other in taken[place + 1 :])
    left = [counter for counter in found if counter not in taken]
    for counter in left:
        covering = [other for other in taken if overlap(counter.parts, other.parts)]
        assert covering
        assert min(ORDER.index(other.scope) for other in covering) <= ORDER.index(counter.scope)
    assert len(notes) >= len(left)


@given(some=PARTS, other=PARTS)
def test_what_is_not_known_to_be_apart_counts_as_the_same(some: Part, other: Part) -> None:
    def meant(part: Part) -> set[tuple[int, str]]:
        sockets = range(4) if part.socket is None else [part.socket]
        return {(socket, index) for socket in sockets for index in ([part.index] if part.index else ["a", "b"])}

    assert some.overlaps(other) == (some.kind == other.kind and bool(meant(some) & meant(other)))
    assert some.overlaps(other) == other.overlaps(some)
