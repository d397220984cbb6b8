"""YAML into configurations, and what a user reads when something in it is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.config import RunConfig
from hpc.config.load import load_config
from hpc.errors import ConfigError, DataError, GreenMoEError

CHAIN = """\
name: demo
stages:
  - name: text
    kind: prepare
    sources: [{module: "pydoc_data.topics:topics"}]
  - name: pretrain
    kind: pretrain
    needs: [text]
    train:
      model: {hidden_size: 64, num_layers: 2, num_attention_heads: 2, expert_size: 64}
      router: {num_experts: 8}
      batches: {seq_len: 64, micro_batch_size: 2, tokens_per_step: 256}
      steps: 30
      optimizer: {lr: 3e-4}
      parallel: {ranks_per_node: 2, expert_parallel_size: 2}
"""


ANCHORED = """\
  - name: first
    kind: lora
    needs: [text, pretrain]
    train: &lora
      batches: {seq_len: 64, micro_batch_size: 2, tokens_per_step: 256}
      steps: 30
      optimizer: {lr: 3e-4}
  - {name: second, kind: lora, needs: [text, pretrain], train: *lora}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("moe.yaml")
    path.write_text(CHAIN)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(GreenMoEError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def edited(path: Path, before: str, after: str) -> Path:
    assert before in CHAIN
    path.write_text(CHAIN.replace(before, after))
    return path


def test_scientific_notation_is_a_number(config: Path) -> None:
    loaded = load_config(config)
    assert loaded.stage("pretrain").train.optimizer.lr == 3e-4


def test_an_unknown_key_is_refused_with_file_line_key_and_the_nearest_right_one(config: Path) -> None:
    edited(config, "{num_experts: 8}", "{num_experts: 8, topk: 2}")
    assert refused(config) == "moe.yaml:11: stages[1].train.router: unknown key 'topk'; did you mean 'top_k'?"


def test_a_wrong_type_names_the_value_and_what_is_expected(config: Path) -> None:
    edited(config, "steps: 30", "steps: many")
    assert refused(config).startswith("moe.yaml:13: stages[1].train.steps: 'many': input should be a valid integer")


def test_a_missing_key_is_named_with_its_help(config: Path) -> None:
    edited(config, "optimizer: {lr: 3e-4}", "optimizer: {weight_decay: 0}")
    message = "moe.yaml:14: stages[1].train.optimizer: the key 'lr' is missing (Peak learning rate)"
    assert refused(config) == message


def test_an_unknown_kind_lists_the_kinds(config: Path) -> None:
    edited(config, "kind: pretrain", "kind: pretrian")
    assert refused(config) == "moe.yaml:7: stages[1]: unknown kind 'pretrian'; did you mean 'pretrain'?"


def test_a_circle_of_needs_is_refused_and_drawn(config: Path) -> None:
    edited(config, "  - name: pretrain", "    needs: [pretrain]\n  - name: pretrain")
    message = refused(config)
    assert "the chain goes in a circle" in message
    assert "text -> pretrain -> text" in message or "pretrain -> text -> pretrain" in message


def test_an_unknown_need_is_refused_with_the_nearest_stage(config: Path) -> None:
    edited(config, "needs: [text]", "needs: [txt]")
    assert "stages[1] 'pretrain' needs 'txt', which is not a stage; did you mean 'text'?" in refused(config)


def test_a_stage_without_the_input_it_requires_is_refused(config: Path) -> None:
    edited(config, "    needs: [text]\n", "")
    assert "needs a stage that produces tokens: add one of text to needs" in refused(config)


def test_a_stage_with_an_input_it_cannot_use_is_refused(config: Path) -> None:
    config.write_text(
        CHAIN + "  - {name: small, kind: quantize, needs: [pretrain]}\n"
        "  - {name: smaller, kind: quantize, needs: [pretrain, small]}\n"
    )
    assert "stages[3] 'smaller' (quantize) cannot use 'small', which produces quantized" in refused(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("method: auto_round", "look at text, and needs names no stage that produces tokens: add one"),
        ("bits_per_weight: 4.25", "look at text, and needs names no stage that produces tokens: add one"),
        ("calibration: {min_expert_tokens: 9}", "look at text, and needs names no stage that produces tokens"),
        ("format: fp8", "bits = 4, but format = fp8 has bits = 8: set it so"),
        (
            "format: fp8, bits: 8, method: auto_round",
            "format = fp8 is rounded to nearest without text",
        ),
        ("bits: 8, symmetric: false", "is a format no runtime reads: set symmetric: true"),
        ("bits: 9", "bits: 9: input should be less than or equal to 8"),
        ("calibration: {tokens: 100}", "tokens = 100 is less than a window, seq_len = 256: raise tokens"),
        ("calibration: {max_tokens: 1000}", "max_tokens = 1000 is less than tokens = 32768: raise max_tokens"),
    ],
)
def test_a_quantization_that_cannot_be_is_refused_with_a_way_out(config: Path, settings: str, words: str) -> None:
    config.write_text(CHAIN + f"  - {{name: small, kind: quantize, needs: [pretrain], {settings}}}\n")
    assert words in refused(config)


def test_a_name_used_twice_is_refused(config: Path) -> None:
    edited(config, "name: pretrain", "name: text")
    assert "the name is used twice" in refused(config)


def test_expert_parallelism_that_does_not_divide_names_a_way_out(config: Path) -> None:
    edited(config, "num_experts: 8", "num_experts: 9")
    message = "stages[1].train: 9 experts do not split over expert_parallel_size = 2: choose a divisor of 9"
    assert message in refused(config)


def test_tokens_that_do_not_divide_name_a_number_that_does(config: Path) -> None:
    edited(config, "tokens_per_step: 256", "tokens_per_step: 1000")
    assert "(2 x 2 x 64 = 256): try 768" in refused(config)


def test_a_file_that_does_not_exist_is_a_data_error(config: Path) -> None:
    edited(config, 'module: "pydoc_data.topics:topics"', "files: [missing.txt]")
    with pytest.raises(DataError, match=r"moe\.yaml:5: .*there is no file 'missing\.txt'"):
        load_config(config)


def test_a_configuration_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refused(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the file is empty"),
        ("- 1\n", "expected keys and values"),
        ("name: [\n", "not valid YAML"),
        ("name: a\nname: b\n", "moe.yaml:2: the key 'name' stands twice"),
        ("a: &x [*x]\n", "an alias refers to something that contains it"),
    ],
)
def test_broken_files_are_told_in_one_line(config: Path, content: str, expected: str) -> None:
    config.write_text(content)
    assert expected in refused(config)


def test_a_file_extends_others_and_lists_of_stages_merge_by_name(config: Path) -> None:
    Path("longer.yaml").write_text(
        "extends: moe.yaml\nname: longer\nstages:\n  - {name: pretrain, train: {steps: 99}}\n"
    )
    loaded = load_config(Path("longer.yaml"))
    assert loaded.name == "longer"
    assert [stage.name for stage in loaded.stages] == ["text", "pretrain"]
    assert loaded.stage("pretrain").train.steps == 99


def test_an_error_in_an_extended_file_names_that_file(config: Path) -> None:
    edited(config, "steps: 30", "stops: 30")
    Path("longer.yaml").write_text("extends: moe.yaml\nname: longer\n")
    assert refused(Path("longer.yaml")).startswith("moe.yaml:13: stages[1].train: unknown key 'stops'")


def test_extending_in_a_circle_is_refused(config: Path) -> None:
    Path("a.yaml").write_text("extends: b.yaml\n")
    Path("b.yaml").write_text("extends: a.yaml\n")
    assert "extends goes in a circle" in refused(Path("a.yaml"))


def test_overrides_reach_stages_by_name(config: Path) -> None:
    loaded = load_config(config, ["stages.pretrain.train.steps=7", "seed=3"])
    assert (loaded.stage("pretrain").train.steps, loaded.seed) == (7, 3)


def test_an_override_of_one_stage_leaves_others_that_share_its_anchor(config: Path) -> None:
    config.write_text(config.read_text() + ANCHORED)
    loaded = load_config(config, ["stages.first.train.steps=7"])
    assert [loaded.stage(name).train.steps for name in ("first", "second")] == [7, 30]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.pretrian.train.steps=3", "there is no 'pretrian' in this list; did you mean 'pretrain'?"),
        ("stages.pretrain.train.stepz=3", "--set stages.pretrain.train.stepz: stages[1].train: unknown key 'stepz'"),
        ("steps", "expected KEY=VALUE"),
        ("name=[", "the value is not valid YAML"),
        ("name.x=1", "name is 'demo', which has no keys in it"),
    ],
)
def test_wrong_overrides_name_the_override(config: Path, override: str, expected: str) -> None:
    assert expected in refused(config, override)


def test_configurations_are_frozen(config: Path) -> None:
    with pytest.raises(Exception, match="frozen"):
        load_config(config).name = "other"


def test_every_shipped_configuration_loads_and_names_its_schema(root: Path) -> None:
    shipped = sorted((root / "configs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        assert isinstance(load_config(path), RunConfig)
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json")


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
trees: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "stages", "kind", "needs", "train", "sources", "files", "seed", "router"])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(tree=trees)
def test_no_content_makes_loading_fail_otherwise_than_in_one_line(tmp_path_factory: Any, tree: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump(tree))
    try:
        load_config(path)
    except (ConfigError, DataError) as error:
        assert "\n" not in str(error)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_no_text_makes_loading_fail_otherwise_than_in_one_line(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        load_config(path)
    except (ConfigError, DataError) as error:
        assert "\n" not in str(error)
