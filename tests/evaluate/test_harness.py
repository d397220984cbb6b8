"""lm-eval's tasks from files, put to a real model: choices, text scored as a whole, text written; bad task files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc.errors import ConfigError
from hpc.evaluate.harness import ask, read_task
from hpc.runtimes.hugging_face import Transformers

DOCUMENTS: list[dict[str, Any]] = [
    {"question": "the tokenizer and", "choices": [" the", " of", " a chat template"], "answer": 2},
    {"question": "def tiny", "choices": ["_model(", " people", "="], "answer": 0},
    {"question": "A small Mixtral with", "choices": [" of", " a tokenizer", " hpc"], "answer": 1},
]
DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
"""
CHOICES = """
task: small_choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ROLLING = """
task: small_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
"""
WRITING = """
task: small_writing
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "nobody says this"
generation_kwargs: {until: ["e"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with task files and their data; caches of datasets go there too."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)), encoding="utf-8")
    for name, text in (("choices", CHOICES), ("rolling", ROLLING), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(DATA + text, encoding="utf-8")
    return tmp_path


def test_every_kind_of_request_is_answered(tasks: Path, tiny_model: Path) -> None:
    model = Transformers(tiny_model)
    files = [str(tasks / f"{name}.yaml") for name in ("choices", "rolling", "writing")]
    found = ask(model, files, context_length=64, prefix_id=0, limit=None)
    assert found["small_choices"]["acc"] == pytest.approx(best_choices(model))
    assert found["small_text"]["bits_per_byte"] == pytest.approx(bits_per_byte(model), rel=1e-5)
    assert found["small_writing"]["exact_match"] == 0


def loss(model: Transformers, context: list[int], answer: list[int]) -> float:
    """Nats of an answer after a context, in double precision."""
    logits = model.logits([*context, *answer][:-1])[-len(answer) :].astype(np.float64)
    return float(sum(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token]
                     for row, token in zip(logits, answer, strict=True)))  # fmt: skip


def best_choices(model: Transformers) -> float:
    """Part of the questions whose right choice is the likeliest."""
    right = 0
    for document in DOCUMENTS:
        context = model.encode(document["question"])
        losses = []
        for choice in document["choices"]:
            whole = model.encode(document["question"] + choice)
            losses.append(loss(model, context, whole[len(context) :]))
        right += int(np.argmin(losses)) == document["answer"]
    return right / len(DOCUMENTS)


def bits_per_byte(model: Transformers) -> float:
    nats = sum(loss(model, [0], model.encode(document["question"])) for document in DOCUMENTS)
    return nats / math.log(2) / sum(len(document["question"].encode()) for document in DOCUMENTS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list", "has no `task:`"),
        ("task: x\nprocess_docs: !function utils.process", "task files with functions are not run"),
    ],
)
def test_a_bad_task_file_says_so(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_task(tmp_path / "x.yaml")


def test_an_unknown_task_says_so(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="lm-eval has no 'hellaswagg'"):
        ask(Transformers(tiny_model), ["hellaswagg"], 64, 0, None)
