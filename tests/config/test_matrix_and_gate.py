"""One stage of a file into many, and what a stage may demand of earlier ones."""

from pathlib import Path

import pytest

from hpc.config.gate import Gate
from hpc.config.load import load_config
from hpc.errors import ConfigError

CHAIN = """\
name: demo
stages:
  - name: text
    kind: prepare
    sources: [{{module: "pydoc_data.topics:topics"}}]
  - name: pretrain
    kind: pretrain
    needs: [text]
    train:
      model: {{hidden_size: 64, num_layers: 2, num_attention_heads: 2, expert_size: 64}}
      router: {{num_experts: 8}}
      batches: {{seq_len: 64, micro_batch_size: 2, tokens_per_step: 256}}
      steps: 30
      optimizer: {{lr: 3e-4}}
  - name: lora
    kind: lora
    matrix: {matrix}
    needs: [pretrain, text]
    train:
      rank: "{{rank}}"
      alpha: 8
      batches: {{seq_len: 64, micro_batch_size: 2, tokens_per_step: 256}}
      steps: 5
      optimizer: {{lr: 3e-4}}
  - {{name: merge, kind: merge, matrix: {matrix}, needs: [pretrain, "lora-{{task}}-{{rank}}"]}}
  - {{name: report, kind: report, needs: [merge]}}
"""


def write(folder: Path, matrix: str = "{task: [a, b], rank: [2, 4]}") -> Path:
    path = folder / "moe.yaml"
    path.write_text(CHAIN.format(matrix=matrix))
    return path


def test_a_matrix_is_written_out_and_its_values_keep_their_types(tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path))
    names = [f"{task}-{rank}" for task in "ab" for rank in (2, 4)]
    assert [stage.name for stage in loaded.stages][2:6] == [f"lora-{name}" for name in names]
    assert loaded.stage("lora-b-4").train.rank == 4
    assert {loaded.stage(f"lora-{name}").array for name in names} == {"lora"}


def test_a_need_of_a_matrix_stage_means_all_its_members_or_the_one_that_is_named(tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path))
    assert loaded.stage("merge-a-2").needs == ["pretrain", "lora-a-2"]
    assert loaded.stage("report").needs == ["merge-a-2", "merge-a-4", "merge-b-2", "merge-b-4"]


def test_an_override_reaches_all_members_or_one(tmp_path: Path) -> None:
    every = load_config(write(tmp_path), ["stages.lora.train.steps=9"])
    assert {every.stage(f"lora-{task}-2").train.steps for task in "ab"} == {9}


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ("[a, b]", "matrix: expected names with lists of values"),
        ("{task: a}", "matrix: expected names with lists of values"),
        ("{task: [[a]], rank: [2]}", "matrix.task: its values must be words or numbers"),
        ('{task: ["a b"], rank: [2]}', "lora-a b-2"),
        ('{task: ["x\\ny"], rank: [2]}', "name"),
    ],
)
def test_a_wrong_matrix_is_told(tmp_path: Path, matrix: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, matrix))
    assert expected in str(caught.value)


METRICS = {"pretrain": {"heldout_loss": 3.1, "tokens": 10}, "text": {"tokens": 5}}


@pytest.mark.parametrize(
    ("text", "missed"),
    [
        ("heldout_loss < 3.2", None),
        ("pretrain.heldout_loss<=3.1", None),
        ("heldout_loss < 3.0", "gate 'heldout_loss < 3.0' missed: pretrain has heldout_loss = 3.1"),
        ("tokens > 7", "gate 'tokens > 7' missed: text has tokens = 5"),
        ("text.heldout_loss < 9", "gate 'text.heldout_loss < 9': no receipt of text has heldout_loss"),
        ("kl >= 1e-3", "gate 'kl >= 1e-3': no receipt of pretrain, text has kl"),
    ],
)
def test_a_gate_holds_or_says_which_receipt_misses_it(text: str, missed: str | None) -> None:
    assert Gate.parse(text).missed(METRICS) == missed


@pytest.mark.parametrize("text", ["", "loss", "loss < x", "loss == 3", "loss < 3; rm", "a b < 3", "1loss < 3"])
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="METRIC < NUMBER"):
        Gate.parse(text)
