"""`launch.py bench plan`: rows of a CSV in the spellings people use, errors in one line, figures that add up."""

import json
from math import log
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc.bench.plan import score, show
from hpc.bench.plan_rows import PUBLISHED, Row, parse, predicted, read
from hpc.errors import ConfigError
from hpc.plan.constants import Constants, constants, fitted
from hpc.plan.step_time import step_time
from tests.conftest import Launch

CELLS = {"hardware": "DGX-H100", "gpus": "64", "model": "LLAMA3_70B", "precision": "FP8", "seq": "8192", "gbs": "128",
         "mbs": "1", "tp": "4", "pp": "8", "vp": "5", "cp": "1", "ep": "1", "fsdp_or_dp": "", "recompute": "",
         "metric": "tokens/s/GPU", "value": "1,600"}  # fmt: skip
HEADER = ",".join(CELLS)
ODD = [
    "0",
    "-1",
    "inf",
    "nan",
    "²",
    "٣",
    "1e30",
    "0.001",
    "8*0",
    "1/2",
    "FSDP",
    "64",
    "4M",
    "Foo 0x7B",
    "X 3B-A30B",
    "MFU",
]


def read_row(**cells: str) -> Row:
    return parse({**CELLS, **cells})


def scored(**cells: str) -> Row:
    found = read_row(**cells)
    assert found.reason is None, found.reason
    return found


@pytest.mark.parametrize(
    ("column", "text", "field", "value"),
    [
        ("seq", "8k", "seq", 8192), ("seq", "4,096", "seq", 4096), ("seq", "", "seq", 4096),
        ("vp", "n/a", "virtual", 1),
        ("tp", "4 (0)", "tensor", 4), ("gpus", "8x8", "gpus", 64), ("cp", "", "context", 1),
        ("mbs", "2.0", "micro_batch", 2),
        ("gbs", "4M", "global_batch", 488), ("gbs", "1048576", "global_batch", 128),  # tokens, as models state them
        ("fsdp_or_dp", "FSDP", "zero_stage", 3), ("fsdp_or_dp", "HSDP", "shard", 8),
        ("fsdp_or_dp", "ZeRO-3", "zero_stage", 3),
        ("fsdp_or_dp", "0", "zero_stage", 1), ("fsdp_or_dp", "DDP", "zero_stage", 1),
        ("fsdp_or_dp", "zero2", "zero_stage", 1),
        ("recompute", "Full", "recompute", "full"), ("recompute", "selective", "recompute", "selective"),
        ("recompute", "mlp,moe", "recompute", "selective"), ("recompute", "False", "recompute", "none"),
        ("precision", "FP8-CS", "precision", "fp8"), ("precision", "fp8 blockwise", "precision", "fp8_block"),
        ("precision", "FP8-MX", "precision", "mxfp8"), ("precision", "NVFP4", "precision", "nvfp4"),
        ("precision", "amp_bf16", "precision", "bf16"), ("precision", "float8", "precision", "fp8"),
        ("precision", "", "precision", "bf16"), ("precision", "fp16", "precision", "bf16"),
    ],
)  # fmt: skip
def test_cells_are_read_as_people_write_them(column: str, text: str, field: str, value: object) -> None:
    found = scored(**{column: text})
    assert getattr(found.layout, field) == value


@pytest.mark.parametrize(
    ("metric", "value", "kind", "measured"),
    [
        ("tokens/s/GPU", "1600", "tokens", 1600), ("Tokens / sec / GPU", "1.6k", "tokens", 1600),
        ("tokens_per_sec_per_gpu", "1600", "tokens", 1600), ("TGS", "1600", "tokens", 1600),
        ("WPS", "1600", "tokens", 1600),
        ("throughput (tokens/s/device)", "1600", "tokens", 1600), ("tokens/s", "102400", "tokens of all", 102400),
        ("Model TFLOP / sec / GPU", "720", "flops", 720e12), ("tflops_per_gpu", "720", "flops", 720e12),
        ("TFLOPs", "720", "flops", 720e12), ("aggregate PFLOP/s", "46", "flops", 46e15),
        ("MFU (%)", "38.5", "utilization", 0.385),
        ("mfu", "0.385", "utilization", 0.385), ("step time (s)", "10.5", "step", 10.5),
        ("iteration time (ms)", "10500", "step", 10.5),
        ("seconds per iteration", "10.5", "step", 10.5), ("samples/s", "12", "samples", 12),
        ("samples/sec/GPU", "0.2", "samples", 0.2),
        ("GPU-hours per trillion tokens", "180000", "hours", 180000 * 3600 / 1e12),
        ("gpu hours / 1T tokens", "180K", "hours", 180000 * 3600 / 1e12),
    ],
)  # fmt: skip
def test_metrics_are_known_by_many_names(metric: str, value: str, kind: str, measured: float) -> None:
    found = scored(metric=metric, value=value)
    assert found.metric is not None
    assert found.metric.kind == kind
    assert found.measured == pytest.approx(measured)


def test_all_metrics_of_one_run_say_the_same_seconds() -> None:
    """A step of 10 s on 64 GPUs with 128 sequences of 8192 tokens."""
    tokens = 128 * 8192 / 10
    for metric, expected in (
        ("step time (s)", 10),
        ("tokens/s", tokens),
        ("tokens/s/GPU", tokens / 64),
        ("samples/s", 12.8),
        ("GPU-hours per trillion tokens", 64 / tokens),
    ):
        assert predicted(scored(metric=metric), 10.0) == pytest.approx(expected), metric
    shape = scored().shape
    assert shape is not None
    assert predicted(scored(metric="TFLOP/s/GPU"), 10.0) == pytest.approx(shape.training_flops(8192) * tokens / 64)
    full = predicted(scored(metric="TFLOP/s/GPU full attention"), 10.0)
    assert full == pytest.approx(shape.training_flops(8192, causal=False) * tokens / 64)
    assert predicted(scored(metric="MFU"), 10.0) == pytest.approx(full / 1979e12)


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"hardware": "TPU v5p"}, "H100, H100-PCIe"),
        ({"model": "secret"}, "its name says no size"),
        ({"metric": "joules"}, "tokens/s/GPU"),
        ({"precision": "int4"}, "nvfp4"),
        ({"value": "fast"}, "'fast' is not a number"),
        ({"value": ""}, "not a positive number"),
        ({"gbs": "1e400"}, "gbs '1e400' is too large"),
        ({"model": "0B"}, "between 1M and 100T"),
        ({"model": "GPT (h=0 L=2)"}, "a width or depth that cannot be"),
        ({"gpus": "16"}, "tp 4 x pp 8 x cp 1 are more than 16 gpus"),
    ],
)
def test_a_row_that_cannot_be_scored_says_why_in_one_line(cells: dict[str, str], told: str) -> None:
    reason = read_row(**cells).reason
    assert reason is not None
    assert told in reason
    assert "\n" not in reason


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(sorted(CELLS)), st.sampled_from(ODD)), max_size=5).map(dict))
def test_no_cell_is_a_traceback(cells: dict[str, str]) -> None:
    found = read_row(**cells)
    if found.reason is None:
        assert 0 < _predicted(found, constants()) < float("inf")
    else:
        assert "\n" not in found.reason


def test_a_row_with_only_what_is_required_is_scored_and_says_what_was_assumed() -> None:
    found = parse({"hardware": "a100", "model": "MPT-7B", "metric": "MFU", "value": "55"})
    assert found.reason is None
    assert found.assumed == ("gpus", "precision", "seq", "gbs", "mbs")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hardware,gpus,model,metric\nH100,8,Llama 3 8B,MFU\n", "no column 'value'"),
        ("", "no column 'hardware'; the first line has nothing"),
        (HEADER + "\n", "no row can be scored: it has no rows"),
        (HEADER + "\nTPU,8,Llama 3 8B,,,,,,,,,,,,MFU,40\n", "no row can be scored: hardware 'TPU' is not known"),
    ],
)
def test_a_csv_that_cannot_be_scored_is_told_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ConfigError) as caught:
        score(tmp_path / "rows.csv")
    assert told in str(caught.value)


def test_a_csv_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.csv"):
        score(tmp_path / "gone.csv")


def test_rows_of_others_are_scored_beside_those_that_cannot_be(tmp_path: Path) -> None:
    """Columns in another order and case, a byte-order mark, spaces, quotes, a comma too many, an empty line."""
    (tmp_path / "rows.csv").write_text(
        "\ufeffModel, Hardware ,GPUs,Metric,Value,Extra\n"
        '"Llama 3, 8B",H100,8,tokens/s/GPU,"12,000",x\n'
        "Llama 3 8B,abacus,8,tokens/s/GPU,12,x\n,,,,,\n"
        "Llama 3 70B,B200,64,MFU (%),45,x,y,z\n",
        encoding="utf-8",
    )
    found = score(tmp_path / "rows.csv")
    assert (found["scored"], found["not_scored"]) == (2, 1)
    assert found["rows"][0]["measured"] == 12000
    assert found["rows"][2]["measured"] == pytest.approx(45)
    assert "abacus" in found["rows"][1]["reason"]
    assert "abacus" in show(found)


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return score()


def test_every_published_row_is_scored_and_cites_its_source(published: dict[str, Any]) -> None:
    assert published["not_scored"] == 0
    assert all(line["source"] and line["read"] for line in published["rows"])
    families = {line["accelerator"] for line in published["rows"]}
    kinds = [line.shape.moe_layers > 0 for line in read(PUBLISHED) if line.shape]
    assert len(published["rows"]) >= 80
    assert len(published["by_source"]) >= 12
    assert len(families) >= 6
    assert 10 <= sum(kinds) <= len(kinds) - 10  # MoE and dense


def test_the_medians_are_those_of_the_rows(published: dict[str, Any]) -> None:
    errors = [abs(line["predicted"] - line["measured"]) / line["measured"] for line in published["rows"]]
    assert [line["error"] for line in published["rows"]] == pytest.approx(errors)
    assert published["median_error"] == pytest.approx(median(errors))
    assert published["mean"] == pytest.approx(fmean(errors))
    assert f"{published['median_error']:.1%}" in show(published)
    for kind in ("MoE", "dense"):
        of_kind = [line["error"] for line in published["rows"] if line["kind"] == kind]
        assert published["by_kind"][kind] == {"rows": len(of_kind), "median_error": pytest.approx(median(of_kind))}
    for line in published["rows"]:
        assert sum(line["parts"].values()) == pytest.approx(1)


def test_a_source_left_out_is_predicted_with_constants_that_did_not_see_it(published: dict[str, Any]) -> None:
    errors = []
    for row in read(PUBLISHED):
        assert row.measured is not None
        c = constants(fitted()["without_source"][row.source])
        errors.append(abs(_predicted(row, c) / row.measured - 1))
    assert published["leave_one_source_out"] == pytest.approx(median(errors))
    assert fitted()["without_source"]["mosaicml/llm-foundry"] != fitted()["all"]


def test_the_model_predicts_published_runs_within_the_errors_that_are_claimed(published: dict[str, Any]) -> None:
    assert published["median_error"] < 0.12
    assert published["leave_one_source_out"] < 0.15
    assert published["leave_one_hardware_out"] < 0.17


def test_a_fit_follows_runs_that_follow_the_model_with_other_constants() -> None:
    from hpc.bench.plan_fit import fit

    truth, rows = constants({"gemm_hopper": 0.7, "fp8_hopper": 0.6, "element_bytes": 2.0}), []
    for found in read(PUBLISHED)[::4]:
        if found.accelerator is not None and found.accelerator.family == "hopper":
            assert found.shape is not None
            assert found.layout is not None
            value = predicted(found, step_time(found.shape, found.layout, found.accelerator, truth).seconds)
            rows.append(Row(**{**vars(found), "measured": value}))

    def error(c: Constants) -> float:
        return median(abs(log(_predicted(row, c) / (row.measured or 1))) for row in rows)

    before = error(Constants())
    assert before > 0.08
    assert error(fit(rows)) < before / 3


def test_a_new_fit_is_written_for_all_rows_and_without_each_source_and_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc.bench.plan_fit import write
    from hpc.plan import constants as module

    lines = PUBLISHED.read_text(encoding="utf-8").splitlines()
    (tmp_path / "rows.csv").write_text("\n".join([lines[0], *lines[1::130]]), encoding="utf-8")
    rows = read(tmp_path / "rows.csv")
    with monkeypatch.context() as patch:
        patch.setattr(module, "FITTED", tmp_path / "step_time.json")
        write(tmp_path / "rows.csv")
        found = fitted()
        assert constants() == constants(found["all"]) != Constants()
    module.fitted.cache_clear()
    module._best.cache_clear()
    assert set(found["without_source"]) == {row.source for row in rows}
    assert set(found["without_hardware"]) == {row.accelerator.name for row in rows if row.accelerator}
    assert len(fitted()["without_source"]) > len(found["without_source"])


def _predicted(row: Row, c: Constants) -> float:
    assert row.shape is not None
    assert row.layout is not None
    assert row.accelerator is not None
    return predicted(row, step_time(row.shape, row.layout, row.accelerator, c).seconds)


def test_the_verb_prints_a_table_and_one_json_object(launch: Launch, tmp_path: Path) -> None:
    result = launch("bench", "plan", "--json")
    assert result.returncode == 0, result.stderr
    *table, last = result.stdout.strip().splitlines()
    found = json.loads(last)
    assert {"median_error", "mean", "leave_one_source_out", "rows"} <= set(found)
    assert f"median error {found['median_error']:.1%}" in table[-1]
    (tmp_path / "rows.csv").write_text("hardware,model\n")
    result = launch("bench", "plan", "--rows", tmp_path / "rows.csv")
    assert result.returncode == 2
    assert "no column 'metric'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
