"""Conversations: what the template makes of them, which tokens are answers, and that only those are learned from."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc.data.chat import PLAIN, TEMPLATE, answer_mask, messages_of, render, to_document
from hpc.data.loader import IGNORED, Loader, Share
from hpc.data.store import TokenStore, answers_of, write_store
from hpc.data.tokenizer import load_tokenizer
from hpc.errors import DataError
from hpc.evaluate.loss import held_out_loss
from tests.data.preparation import prepare_sources

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, four."},
]


def answers_in(template: str, folder: Path, messages: list[dict[str, str]]) -> list[str]:
    (folder / TEMPLATE).write_text(template)
    chat = render(to_document(messages), folder)
    return [chat.text[first:last] for first, last in chat.answers]


def test_answers_are_what_the_template_writes_behind_its_generation_prompt(tmp_path: Path) -> None:
    assert answers_in(CHATML, tmp_path, TALK) == ["Four.<end>\n", "Yes, four.<end>\n"]


def test_without_a_template_roles_stand_in_words(tmp_path: Path) -> None:
    chat = render(to_document(TALK[:2]), tmp_path / "none")
    assert chat.text == "User: Two and two?\nAssistant: Four.\n"
    assert [chat.text[first:last] for first, last in chat.answers] == ["Four.\n"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    template = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match="only appends"):
        answers_in(template, tmp_path / "", TALK)


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{{ messages.x.y }}"])
def test_what_a_template_refuses_is_told_in_one_line(template: str, tmp_path: Path) -> None:
    folder = tmp_path / str(len(template))
    folder.mkdir()
    with pytest.raises(DataError, match="refuses a conversation"):
        answers_in(template, folder, TALK)


def test_a_template_cannot_reach_the_interpreter(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="refuses a conversation"):
        answers_in("{{ ''.__class__.__mro__[1].__subclasses__() }}", tmp_path, TALK)


def test_records_are_messages_or_a_prompt_with_its_completion() -> None:
    assert messages_of({"prompt": "a", "completion": "b"}) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert messages_of({"messages": TALK, "id": 3}) == TALK
    assert messages_of({"messages": [{"role": "user"}]}) is None
    assert messages_of({"text": "x"}) is None


def test_a_token_is_an_answer_when_it_begins_inside_one() -> None:
    assert answer_mask([(0, 3), (3, 5), (5, 6), (6, 9), (9, 12)], [(3, 6), (9, 12)]) == [0, 1, 1, 0, 1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    lines = [
        json.dumps(
            {"prompt": f"What is {n} and {n}? Say it in a whole sentence.", "completion": f"It is {2 * n}, I think."}
        )
        for n in range(300)
    ]
    (folder / "talk.jsonl").write_text("\n".join(lines))
    source = {"files": [str(folder / "talk.jsonl")], "format": "chat"}
    prepare_sources(folder / "run", [source])
    return folder / "run/stages/text/artifact"


def test_prepared_answers_are_the_completions_and_nothing_else(prepared: Path) -> None:
    store, tokenizer = TokenStore(prepared / "train"), load_tokenizer(prepared / "tokenizer")
    assert (prepared / "tokenizer" / TEMPLATE).read_text() == PLAIN
    first = store.document_starts(1, len(store))[0]
    assert store.answers is not None
    marked = store.answers[:first].astype(bool)
    ids = store.tokens[:first]
    answer, prompt = tokenizer.decode(ids[marked].tolist()), tokenizer.decode(ids[~marked].tolist())
    assert answer.strip().startswith("It is")
    assert answer.strip().endswith("I think.")
    assert prompt.startswith("User: What is")
    assert prompt.rstrip().endswith("Assistant:")
    assert 0.2 < store.answers.mean() < 0.8


def test_the_loader_gives_no_target_outside_of_answers(prepared: Path) -> None:
    store = TokenStore(prepared / "train")
    (batch,) = Loader((Share("talk", store),), 32, 2, 1, 0, 1, seed=1).micro_batches(0)
    assert batch.answers is not None
    assert (batch.targets[~batch.answers] == IGNORED).all()
    assert (batch.targets[batch.answers] == batch.ids[:, 1:][batch.answers]).all()
    assert 0 < batch.answers.sum() < batch.answers.size


def test_held_out_loss_is_the_mean_over_answers(tmp_path: Path) -> None:
    write_store(tmp_path / "held", [[1, 2, 3, 1, 2, 3, 1, 2, 3]], 4)
    write_store(answers_of(tmp_path / "held"), [[0, 1, 0, 0, 1, 0, 0, 0, 0]], 2)
    costs = torch.tensor([0.0, 0.3, 0.6, 0.1])  # probability of the next token by its id

    def forward(ids: torch.Tensor, _positions: torch.Tensor | None) -> torch.Tensor:
        return costs.log().expand(*ids.shape, 4)

    loss, count = held_out_loss(forward, [TokenStore(tmp_path / "held")], seq_len=4, batch_size=2)
    assert count == 2
    assert loss == pytest.approx(-np.log(0.6))


def test_a_line_that_is_no_conversation_is_named(tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    source = {"files": [str(tmp_path / "talk.jsonl")], "format": "chat"}
    with pytest.raises(DataError, match=r"talk.jsonl:2: not a conversation"):
        prepare_sources(tmp_path / "run", [source])


def test_a_conversation_that_begins_with_an_answer_learns_no_token_from_the_one_before() -> None:
    assert answer_mask([(0, 3), (3, 5), (5, 9), (9, 12)], [(0, 5), (9, 12)]) == [0, 1, 0, 1]
    assert answer_mask([], [(0, 5)]) == []
