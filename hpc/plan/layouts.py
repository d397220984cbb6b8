"""`plan --search`: every layout of a training stage that a site could run, which of them fit, and why others do not.

A layout is what may change without changing what is learned: nodes, ranks, ZeRO stage, expert parallelism, micro-batch,
recomputation. Tokens of a step stay as they are, so that the curve does.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import log
from typing import Any

from hpc.config import AdapterTraining, Machine, RunConfig, TrainingBase, Trains
from hpc.errors import ConfigError
from hpc.plan.calibration import Measured
from hpc.plan.facts import Facts, all_facts
from hpc.plan.plan import energy_of, stage_layout, training_seconds
from hpc.plan.quantity import GIB, Quantity
from hpc.plan.work import Work, work

RECOMPUTE = ("none", "attention", "full")
EQUAL = 0.01
"""Part by which times or energies differ that are taken as the same."""


@dataclass(frozen=True)
class Layout:
    """One way to run a stage."""

    nodes: int
    ranks_per_node: int
    zero_stage: int
    expert_parallel_size: int
    micro_batch_size: int
    recompute: str
    memory_bytes: float
    """Of the fullest rank."""
    seconds: float
    """Of the stage, without failures."""
    energy_j: float

    def overrides(self, stage: str) -> list[str]:
        """What `--set` takes, so that the stage runs like this."""
        at = f"stages.{stage}.train"
        return [
            f"{at}.parallel.nodes={self.nodes}",
            f"{at}.parallel.ranks_per_node={self.ranks_per_node}",
            f"{at}.parallel.expert_parallel_size={self.expert_parallel_size}",
            f"{at}.parallel.zero_stage={self.zero_stage}",
            f"{at}.batches.micro_batch_size={self.micro_batch_size}",
            f"{at}.recompute={self.recompute}",
        ]


@dataclass(frozen=True)
class Search:
    """Of one stage."""

    stage: str
    """As `--set` names it: an array is one stage."""
    fitting: tuple[Layout, ...]
    """Best first."""
    tried: int
    refused: tuple[str, ...]
    """Why the others are not there, one line for each group of them."""
    by: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        best = self.fitting[0].overrides(self.stage) if self.fitting else []
        return {**asdict(self), "best": best}


def search(config: RunConfig, machine: Machine, measured: Measured, name: str | None, by: str = "time") -> Search:
    """Layouts of the stage of that name, or of the one with most FLOPs, ranked by `time` or `energy`.

    Raises ConfigError when there is no such training stage.
    """
    stage, facts, todo = _choose(config, name)
    is_packed = isinstance(stage.train, AdapterTraining) and stage.train.base_bits is not None
    fitting, tried, refusals = [], 0, _Refusals(machine.memory_gib_per_rank * GIB, is_packed=is_packed)
    for settings in layouts(stage.train, facts, machine, refusals):
        tried += 1
        memory, step = stage_layout(facts, settings, machine, measured, stage)
        if refusals.note(settings, memory.bytes):
            continue
        start = measured.start(stage.name, stage.kind)
        start = machine.stage_overhead_s if start is None else start
        seconds = start + training_seconds(settings, todo, step, measured)
        parallel = settings.parallel
        energy = energy_of(machine, Quantity(seconds, "s", "estimated:"), parallel.nodes, parallel.ranks_per_node)
        fitting.append(
            Layout(
                parallel.nodes, parallel.ranks_per_node, parallel.zero_stage, parallel.expert_parallel_size,
                settings.batches.micro_batch_size, settings.recompute, memory.bytes, seconds, energy.value or 0.0,
            )
        )  # fmt: skip
    fitting.sort(key=_order(by))
    return Search(stage.array or stage.name, tuple(fitting), tried, tuple(refusals.lines()), by)


def _order(by: str) -> Callable[[Layout], tuple[float, ...]]:
    """Best first; of what differs by less than the plan can tell, the cheaper and simpler one."""

    def steps(value: float) -> int:
        return round(log(max(value, 1e-9)) / EQUAL)

    def key(layout: Layout) -> tuple[float, ...]:
        time, energy = steps(layout.seconds), steps(layout.energy_j)
        first = (energy, time) if by == "energy" else (time, energy)
        return (*first, layout.zero_stage, RECOMPUTE.index(layout.recompute), layout.memory_bytes)

    return key


def _choose(config: RunConfig, name: str | None) -> tuple[Trains, Facts, Work]:
    facts = all_facts(config)
    found: list[tuple[Trains, Facts, Work]] = []
    for stage in config.ordered():
        known = facts[stage.name]
        if isinstance(stage, Trains) and known is not None and name in (None, stage.name, stage.array):
            found.append((stage, known, work(config, stage, known)))
    if not found:
        trains = [stage.name for stage in config.ordered() if isinstance(stage, Trains)]
        which = f"--stage {name}: no stage of that name trains" if name else "--search: no stage trains"
        raise ConfigError(f"{which} a model whose size is known; those that train are {', '.join(trains) or 'none'}")
    return max(found, key=lambda item: item[2].flops.value or 0.0)


def layouts(settings: TrainingBase, facts: Facts, machine: Machine, refusals: "_Refusals") -> Iterator[TrainingBase]:
    """The stage's settings in every layout whose numbers go into each other."""
    sequences = settings.batches.tokens_per_step // settings.batches.seq_len
    for nodes, per_node in _shapes(machine):
        ranks = nodes * per_node
        if sequences % ranks:
            refusals.note_batch(ranks, sequences)
            continue
        micro_batches = [size for size in _divisors(sequences // ranks) if size in _sizes(sequences // ranks)]
        for group in _divisors(ranks):
            if group > 1 and facts.router.num_experts % group:
                refusals.note_group(group)
                continue
            for zero in (1, 2) if refusals.is_packed else (1, 2, 3):
                parallel = settings.parallel.model_copy(
                    update={"nodes": nodes, "ranks_per_node": per_node, "expert_parallel_size": group,
                            "zero_stage": zero}
                )  # fmt: skip
                for size in micro_batches:
                    batches = settings.batches.model_copy(update={"micro_batch_size": size})
                    for recompute in RECOMPUTE:
                        yield settings.model_copy(
                            update={"parallel": parallel, "batches": batches, "recompute": recompute}
                        )


def _shapes(machine: Machine) -> Iterator[tuple[int, int]]:
    """Nodes and ranks of each: parts of one node, then whole ones in powers of two, and all there are."""
    for per_node in _divisors(machine.ranks_per_node)[:-1]:
        yield 1, per_node
    nodes = 1
    while nodes < machine.max_nodes:
        yield nodes, machine.ranks_per_node
        nodes *= 2
    yield machine.max_nodes, machine.ranks_per_node


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _sizes(most: int) -> set[int]:
    """Micro-batches worth a look: powers of two and three times those, up to 64 sequences."""
    powers = {1 << n for n in range(7)}
    return {size for size in powers | {3 * size for size in powers} if size <= min(most, 64)}


class _Refusals:
    """Why layouts are left out, gathered by ZeRO stage and expert parallelism."""

    def __init__(self, offered_bytes: float, *, is_packed: bool) -> None:
        self._offered = offered_bytes
        self._least: dict[tuple[int, int], dict[int, float]] = {}
        """Micro-batch -> the least that any layout with it needs."""
        self._refused: dict[tuple[int, int], float] = {}
        """The least of any layout that does not fit."""
        self._ranks: dict[int, int] = {}
        self._groups: set[int] = set()
        self.is_packed = is_packed
        """Whether the base is in four bits, which ZeRO 3 does not split."""

    def note(self, settings: TrainingBase, needed: float) -> bool:
        """Whether a layout does not fit."""
        key = (settings.parallel.zero_stage, settings.parallel.expert_parallel_size)
        least, size = self._least.setdefault(key, {}), settings.batches.micro_batch_size
        least[size] = min(needed, least.get(size, needed))
        if needed > self._offered:
            self._refused[key] = min(needed, self._refused.get(key, needed))
        return needed > self._offered

    def note_batch(self, ranks: int, sequences: int) -> None:
        """Ranks that the sequences of a step do not split over."""
        self._ranks[ranks] = sequences

    def note_group(self, group: int) -> None:
        """A group that the experts do not split over."""
        self._groups.add(group)

    def lines(self) -> Iterator[str]:
        """One for each group of layouts; ZeRO stages that fail alike share it."""
        alike: dict[tuple[int, str], list[tuple[int, float]]] = {}
        for zero, group in sorted(self._refused):
            which, least = self._too_large((zero, group))
            alike.setdefault((group, which), []).append((zero, least))
        for (group, which), found in sorted(alike.items()):
            stages, least = _words([zero for zero, _ in found]), min(needed for _, needed in found)
            yield f"zero {stages}, EP {group}, {which}: {least:,.1f} GiB or more of {self._offered / GIB:.3g}"
        if self._groups:
            yield f"EP {_words(sorted(self._groups))}: the experts do not split"
        if self.is_packed:
            yield "zero 3: a base in four bits is not split over ranks"
        if self._ranks:
            sequences = next(iter(self._ranks.values()))
            yield f"{_words(sorted(self._ranks))} ranks: the {sequences:,} sequences of a step do not split"

    def _too_large(self, key: tuple[int, int]) -> tuple[str, float]:
        """Which micro-batches do not fit, and the least GiB that any of these needs."""
        least, refused = self._least[key], self._refused[key]
        never = {size: needed / GIB for size, needed in least.items() if needed > self._offered}
        if len(never) == len(least):
            return "any micro-batch", min(never.values())
        if never:
            return f"micro-batch {min(never)} and more", min(never.values())
        return "without recompute or on few ranks", refused / GIB


def _words(numbers: list[int]) -> str:
    texts = [str(number) for number in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
