"""Models in every format, made and read back by chains that run as a user's do (`launch.py bench shrink`).

configs/bench-shrink-*.yaml are the chains. A format that is refused - its runtime misreads it, a library cannot make
it - ends a chain on one machine; the bench runs it again without that stage, which takes up all receipts, and the row
says why. A model whose chain cannot begin at all (SmolLM2 without a package index) is told in the same way.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hpc.bench.claims.claim import Bench
from hpc.bench.claims.trained import CONFIGS, Load, launch
from hpc.bench.shrink_rows import Row, format_words, read_rows
from hpc.bench.shrink_targets import TARGETS, Judged, judge, mixed_against_uniform
from hpc.config import Evaluate, Export, Quantize, RunConfig, Stage
from hpc.config.load import load_config
from hpc.errors import GreenMoEError, Stopped, StorageError
from hpc.run.attempts import attempt_ends, count_attempts
from hpc.run.directory import RunDirectory

NAME = "bench shrink"


@dataclass(frozen=True)
class Model:
    """One model of the bench."""

    title: str
    file: str
    """Its chain, in configs/."""
    source: str
    """The stage that makes it."""


MOE = Model("the quickstart's mixture of experts", "bench-shrink-moe.yaml", "moe")
MODELS = (
    MOE,
    Model("SmolLM2-135M", "bench-shrink-smollm2.yaml", "smollm2"),
    Model("SmolLM2-135M upcycled to 4 experts", "bench-shrink-upcycled.yaml", "upcycled"),
)
QUICK_FORMATS = ("int8", "int4-rtn", "gguf-q4_k_m")
QUICK_SETTINGS = (
    "stages.moe.train.steps=60",
    "stages.gguf.importance_tokens=0",
    "stages.evaluate.tokens=4096",
    "stages.evaluate.timed_seconds=1",
)


@dataclass(frozen=True)
class Shrunk:
    """One model's table."""

    title: str
    rows: list[Row] = field(default_factory=list)
    why: str | None = None
    """Why there is none."""

    @property
    def judged(self) -> list[Judged]:
        """Targets and comparisons."""
        return [*(judge(self.rows, target) for target in TARGETS), *mixed_against_uniform(self.rows)]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json`: every figure with its provenance."""
        rows = [
            {
                "stage": row.stage, "format": row.format, "runtime": row.runtime, "refused": row.refused,
                "figures": {name: asdict(figure) for name, figure in row.figures.items()},
            }
            for row in self.rows
        ]  # fmt: skip
        judged = [one.to_json() for one in self.judged] if self.rows else []
        return {"model": self.title, "why_none": self.why, "rows": rows, "judged": judged}


def measure(bench: Bench) -> tuple[list[Shrunk], Load]:
    """All models, or a short look at the first. A model or format that is refused is told; raises Stopped and
    StorageError."""
    load, found = Load(), []
    for model in (MOE,) if bench.quick else MODELS:
        try:
            found.append(shrink(bench, model, QUICK_FORMATS if bench.quick else None))
        except (Stopped, StorageError):
            raise
        except GreenMoEError as error:
            found.append(Shrunk(model.title, why=str(error)))
        load.look()
    return found, load


def shrink(bench: Bench, model: Model, formats: Iterable[str] | None = None) -> Shrunk:
    """One model in the formats of its chain, or in those whose stages are named.

    Raises the error that the chain ended with when that was no format's.
    """
    config = load_config(CONFIGS / model.file, QUICK_SETTINGS if bench.quick else ())
    made = [stage for stage in config.stages if isinstance(stage, (Quantize, Export))]
    left_out = set() if formats is None else {stage.name for stage in made} - set(formats)
    asked = [stage for stage in config.stages if stage.name not in left_out]
    refused: dict[str, str] = {}
    bench.tell(f"{NAME}: {model.title} in {', '.join(format_words(one) for one in made if one.name not in left_out)}")
    while True:
        chain = without(config, left_out | set(refused))
        run = RunDirectory(bench.folder / config.name)
        try:
            launch(bench, NAME, str(_written(bench.folder, chain)), config.name, ())
            return Shrunk(model.title, read_rows(run, asked, model.source, refused))
        except GreenMoEError:
            now = {stage.name: why for stage in chain.stages if (why := _refusal(run, stage)) is not None}
            if not now:
                raise
            refused |= now
            for name, why in now.items():
                bench.tell(f"{NAME}: {model.title}: {name} is refused, the rest goes on: {why}")


def without(config: RunConfig, left_out: set[str]) -> RunConfig:
    """A chain without some of its formats, and without what would only look at these."""
    return RunConfig.model_validate({**config.model_dump(mode="json"), "stages": list(_kept(config.stages, left_out))})


def _kept(stages: Sequence[Stage], left_out: set[str]) -> Iterator[dict[str, Any]]:
    makers = {stage.name for stage in stages if isinstance(stage, (Quantize, Export))}
    for stage in stages:
        data = stage.model_dump(mode="json")
        if isinstance(stage, Evaluate):
            data["needs"] = [name for name in stage.needs if name not in left_out]
            if not makers & set(data["needs"]):
                continue
        if stage.name not in left_out:
            yield data


def _written(folder: Path, chain: RunConfig) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{chain.name}.yaml"
    path.write_text(yaml.safe_dump(chain.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return path


def _refusal(run: RunDirectory, stage: Stage) -> str | None:
    """Why a stage that makes a format ended without an artifact, in its own words; None where it did not."""
    directory = run.stage(stage.name)
    if not isinstance(stage, (Quantize, Export)) or directory.receipt.exists():
        return None
    for row in attempt_ends(directory, count_attempts(directory)):
        if row["outcome"] == "failed" and row["exit_code"] != StorageError.exit_code:
            return str(row["message"])
    return None
