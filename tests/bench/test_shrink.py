"""`bench shrink`: its chains, and the table, targets and verdict that it makes of the receipts they leave."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hpc.bench.claims import quantized_size_and_loss
from hpc.bench.claims.claim import Bench
from hpc.bench.claims.trained import CONFIGS
from hpc.bench.shrink import MODELS, QUICK_FORMATS, Model, Shrunk, shrink, without
from hpc.bench.shrink_rows import Figure, Row, format_words, read_rows
from hpc.bench.shrink_show import show
from hpc.bench.shrink_targets import INT4, INT8, judge, mixed_against_uniform
from hpc.config import Evaluate, Export, Quantize, RunConfig
from hpc.config.load import load_config
from hpc.errors import ArtifactError
from hpc.plan.inference.cost import Cost
from hpc.plan.plan import plan
from hpc.run.attempts import Job, record_end, record_start
from hpc.run.directory import RunDirectory
from hpc.run.receipt import Receipt, write_receipt
from slurm.site import load_site
from tests.bench.test_claims import pocket_calculator
from tests.conftest import Launch

SMOLLM2 = MODELS[1]
LOSS = 3.0
PROOF = {"kl": "measured: k", "bits_per_weight": "derived: b"}


def chain(model: Model) -> RunConfig:
    return load_config(CONFIGS / model.file)


def leave(run: RunDirectory, stage: str, kind: str, metrics: dict[str, Any], **more: Any) -> None:
    directory = run.stage(stage)
    directory.root.mkdir(parents=True, exist_ok=True)
    filled = {"inputs": {}, "files": [], "provenance": PROOF, "energy": {}, "code": {}, "seconds": 5.0, "attempts": 1}
    write_receipt(directory, Receipt(stage=stage, kind=kind, config={}, metrics=metrics, **{**filled, **more}))


def evaluated(run: RunDirectory, stage: str, losses: dict[str, float]) -> None:
    models = {
        name: {"text": {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 3, "tokens": 4095}}
        for name, loss in losses.items()
    }
    runtimes = {name: {"runtime": "transformers", "tokens_per_s": 50.0, "j_per_token": 0.5} for name in losses}
    energy = {"provenance": ["estimated: a power model"]}
    provenance = {"runtimes": "measured: 3 s"}
    leave(run, stage, "evaluate", {"models": models, "runtimes": runtimes}, energy=energy, provenance=provenance)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """What SmolLM2's chain might leave; gguf-q8_0 was refused, gguf-iq4_xs never made."""
    run = RunDirectory(tmp_path / "run")
    files = [{"path": "model.safetensors", "bytes": 400, "sha256": ""}, {"path": "x.json", "bytes": 9, "sha256": ""}]
    leave(run, "smollm2", "reuse", {}, files=files, census={"experts": {"parameters": 60}, "norms": {"parameters": 40}})
    for name, bits, kl in (("int8", 8.25, 0.0004), ("int4-rtn", 4.625, 0.04), ("mixed", 4.62, 0.03)):
        told = {"artifact_bytes": 77, "bits_per_weight": 2 * bits, "matrix_bits_per_weight": bits, "kl": kl}
        leave(run, name, "quantize", {**told, "perplexity_ratio": 9.9, "quantize_peak_bytes": 2**30})
    census = {
        "attention": {"parameters": 10, "bytes": 5}, "shared experts and dense layers": {"parameters": 30, "bytes": 16},
        "embedding and head": {"parameters": 100, "bytes": 100}, "norms": {"parameters": 1, "bytes": 4},
    }  # fmt: skip
    told = {"artifact_bytes": 50, "bits_per_weight": 6.0, "kl": 0.02, "perplexity_ratio": 1.03, "export_peak_bytes": 1}
    leave(run, "gguf-q4_k_m", "export", told, census=census)
    evaluated(run, "evaluate", {"smollm2": LOSS, "int8": LOSS + 0.001, "int4-rtn": LOSS + 0.03, "mixed": LOSS + 0.015})
    return run


@pytest.fixture
def rows(run: RunDirectory) -> dict[str, Row]:
    found = read_rows(run, chain(SMOLLM2).stages, "smollm2", {"gguf-q8_0": "KL 3.2: it is refused"})
    return {row.stage: row for row in found}


# The chains -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.source)
def test_a_chain_makes_and_evaluates_every_format(model: Model) -> None:
    config = chain(model)
    assert model.source in {stage.name for stage in config.stages}
    made = [stage for stage in config.stages if isinstance(stage, (Quantize, Export))]
    words = {format_words(stage).split(" g")[0] for stage in made}
    assert {"int8 rtn", "int4 rtn", "int4 auto_round", "fp8", "gguf-q4_k_m imatrix", "mlx-mixed_4_6"} <= words
    judged = {need for stage in config.stages if isinstance(stage, Evaluate) for need in stage.needs}
    assert {stage.name for stage in made} <= judged
    assert all(model.source in stage.needs for stage in made)
    assert len(plan(config, load_site("local").machine).stages) == len(config.stages)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.source)
def test_a_budget_is_as_large_as_uniform_bits_of_its_chain(model: Model) -> None:
    made = {stage.name: stage for stage in chain(model).stages if isinstance(stage, Quantize)}
    mixed, uniform = made["mixed"], made["int4-rtn"]
    assert (mixed.group_size, mixed.symmetric, mixed.method) == (uniform.group_size, uniform.symmetric, uniform.method)
    zero_point = 0 if uniform.symmetric else uniform.bits
    assert mixed.bits_per_weight == uniform.bits + (16 + zero_point) / uniform.group_size


def test_a_chain_without_a_format_is_a_chain() -> None:
    left = without(chain(SMOLLM2), {"int8", "mlx-8bit", "mlx-4bit", "mlx-mixed_4_6"})
    names = {stage.name for stage in left.stages}
    assert {"int8", "mlx-4bit", "evaluate-mlx"}.isdisjoint(names), "nothing is left for evaluate-mlx to look at"
    evaluate = next(stage for stage in left.stages if stage.name == "evaluate")
    assert "int8" not in evaluate.needs
    assert "fp8" in evaluate.needs
    assert set(QUICK_FORMATS) <= {stage.name for stage in chain(MODELS[0]).stages}


def test_a_refused_format_is_left_out_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chains: list[list[str]] = []

    def launch(bench: Bench, claim: str, file: str, name: str, settings: object) -> RunDirectory:
        run = RunDirectory(bench.folder / name)
        made = [stage.name for stage in load_config(Path(file)).stages]
        chains.append(made)
        if "fp8" in made:
            run.stage("fp8").root.mkdir(parents=True)
            attempt = record_start(run.stage("fp8"), Job("t"), 1, "here", 1)
            record_end(run.stage("fp8"), attempt.number, 0, "failed", 4, "KL 3.2: it is refused")
            raise ArtifactError("stage 'fp8': KL 3.2")
        return run

    monkeypatch.setattr("hpc.bench.shrink.launch", launch)
    bench = Bench(machine=lambda name: load_site(name).machine, folder=tmp_path)
    found = {row.stage: row for row in shrink(bench, MODELS[0]).rows}
    assert found["fp8"].refused == "KL 3.2: it is refused"
    assert chains[1] == [name for name in chains[0] if name != "fp8"]
    monkeypatch.setattr("hpc.bench.shrink.without", lambda config, left_out: config)
    monkeypatch.setattr(
        "hpc.bench.shrink.launch", lambda *words: (_ for _ in ()).throw(ArtifactError("the text is damaged"))
    )
    (tmp_path / "bench-shrink-moe").rename(tmp_path / "before")
    with pytest.raises(ArtifactError, match="the text is damaged"):
        shrink(bench, MODELS[0])


@pytest.mark.slow
def test_the_quick_form_measures_every_figure_of_every_format(launch: Launch, tmp_path: Path) -> None:
    result = launch("bench", "shrink", "--quick", "--json", "--folder", tmp_path)
    assert result.returncode == 0, result.stderr
    (model,) = json.loads(result.stdout.splitlines()[-1])["models"]
    source, *made = model["rows"]
    assert [row["stage"] for row in made] == list(QUICK_FORMATS)
    for row in made:
        assert row["refused"] is None
        figures = row["figures"]
        assert all(figure["value"] > 0 for figure in figures.values()), row
        assert figures["artifact_bytes"]["value"] < source["figures"]["artifact_bytes"]["value"]
        assert 0.9 < figures["perplexity_ratio"]["value"] < 1.1
    assert made[2]["runtime"] == "llama.cpp"
    assert {judged["holds"] for judged in model["judged"]} <= {True, False}


# The table ------------------------------------------------------------------------------------------------------------


def test_loss_is_the_evaluate_stages_where_there_is_one_else_the_proofs(rows: dict[str, Row]) -> None:
    assert rows["int4-rtn"].value("perplexity_ratio") == pytest.approx(math.exp(0.03))
    assert rows["gguf-q4_k_m"].value("perplexity_ratio") == 1.03
    assert rows["int4-rtn"].figures["j_per_token"].provenance.startswith("estimated: a power model")
    assert rows["int4-rtn"].figures["kl"] == Figure(0.04, "measured: k")
    assert all(figure.provenance for row in rows.values() for figure in row.figures.values())


def test_bits_are_told_for_the_file_and_for_the_matrices_of_layers(rows: dict[str, Row]) -> None:
    assert next(iter(rows)) == "smollm2"
    assert rows["smollm2"].value("bits_per_weight") == 8 * 400 / 100
    assert rows["smollm2"].value("artifact_bytes") == 409
    assert rows["int8"].value("matrix_bits_per_weight") == 8.25
    assert rows["gguf-q4_k_m"].value("matrix_bits_per_weight") == pytest.approx(8 * 21 / 40)


def test_the_page_shows_missing_figures_as_such_and_names_reasons(rows: dict[str, Row]) -> None:
    text = show([Shrunk("SmolLM2", list(rows.values())), Shrunk("another", why="no package index")])
    line = next(line for line in text.splitlines() if line.startswith("gguf-q4_k_m"))
    assert "1.0300" in line
    assert " - " in line, "nothing was written with it"
    assert "gguf-q8_0 imatrix is refused: KL 3.2" in text
    assert "not measured: no package index" in text
    assert all(len(line) <= 120 for line in text.splitlines())


# Targets --------------------------------------------------------------------------------------------------------------


def test_a_target_is_judged_by_the_best_format_of_its_class(rows: dict[str, Row]) -> None:
    judged = judge(list(rows.values()), INT4)
    assert judged.holds
    assert "mixed 4.625 rtn g32 asymmetric, +1.51%" in judged.because
    assert "1 of 3 formats keep to it" in judged.because
    assert judge([rows["int4-rtn"], rows["gguf-q4_k_m"]], INT4).holds is False
    assert judge([rows["int8"]], INT8).holds
    assert judge([rows["smollm2"], rows["gguf-q8_0"]], INT8).holds is None


def test_mixed_bits_stand_beside_uniform_ones_of_the_same_size(rows: dict[str, Row]) -> None:
    (judged,) = mixed_against_uniform(list(rows.values()))
    assert judged.holds
    assert "KL 0.0300 against 0.0400 of int4 rtn g32" in judged.because
    (alone,) = mixed_against_uniform([rows["mixed"], rows["int8"]])
    assert alone.holds is None


# The claim ------------------------------------------------------------------------------------------------------------


def small(ratio: float) -> Row:
    stage = next(stage for stage in chain(MODELS[0]).stages if stage.name == "gguf-q4_k_m")
    figures = {"bits_per_weight": Figure(4.7, "derived: x"), "perplexity_ratio": Figure(ratio, "derived: y")}
    return Row("gguf-q4_k_m", "gguf-q4_k_m", stage, figures=figures)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (1.01, [1.01, 1.015], "holds"),
        (1.01, [1.01, 1.03], "holds if"),
        (1.05, [1.01, 1.03], "holds if"),
        (1.05, [1.04], "does not hold here"),
    ],
)
def test_the_verdict_follows_the_figures(ours: float, theirs: list[float], verdict: str) -> None:
    costs = [Cost("m", "gguf-q4_k_m", ratio, "http", "somebody", 4.5) for ratio in theirs]
    found, because = quantized_size_and_loss.judged([small(ours)], costs, quick=False)
    assert found == verdict
    assert f"{ours - 1:+.2%}" in because
    assert quantized_size_and_loss.judged([small(ours)], costs, quick=True)[0] == "cannot be told"
    assert quantized_size_and_loss.judged([], costs, quick=False)[0] == "cannot be told"


def test_published_figures_have_sources_and_the_arithmetic_can_be_typed_in() -> None:
    premises = quantized_size_and_loss.premises(quantized_size_and_loss.published())
    assert len(premises) >= 8
    assert all("http" in premise.source for premise in premises)
    for step in quantized_size_and_loss.arithmetic([small(1.0123)]):
        assert pocket_calculator(step.line) == pytest.approx(step.value, rel=1e-3)
