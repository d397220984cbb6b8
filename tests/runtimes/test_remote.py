"""An artifact in a fresh process: the same numbers as here, streams that can be left, deaths told in one line."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc.errors import ArtifactError, DataError
from hpc.model.build import load_model
from hpc.runtimes.artifact import locate
from hpc.runtimes.remote import Remote
from hpc.runtimes.runner import Sampling
from hpc.shrink.proof import compare, continue_both
from tests.conftest import Launch

IDS = [5, 17, 200, 41, 99, 3, 250, 7]


@pytest.fixture(scope="module")
def remote(tiny_model: Path) -> Iterator[Remote]:
    with Remote(tiny_model, 64) as opened:
        yield opened


def test_logits_are_those_of_the_model_here(remote: Remote, tiny_model: Path) -> None:
    model = load_model(tiny_model)
    with torch.no_grad():
        here = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(remote.logits(IDS), here, atol=1e-5)
    assert remote.vocab_size == 320
    assert remote.memory_bytes() == 4 * model.num_parameters() + sum(
        b.numel() * b.element_size() for b in model.buffers()
    )
    assert remote.reading.rate is not None


def test_greedy_text_with_the_cache_is_that_of_logits_without(remote: Remote) -> None:
    expected = list(IDS)
    for _ in range(6):
        token = int(remote.logits(expected)[-1].argmax())
        if token == 0:
            break
        expected.append(token)
    assert list(remote.stream(IDS, 6, Sampling())) == expected[len(IDS) :]


def test_a_stream_may_be_asked_between_and_left(remote: Remote) -> None:
    tokens, texts = [], []
    for token in remote.stream(IDS, 30, Sampling(temperature=1.0, seed=3)):
        tokens.append(token)
        texts.append(remote.decode(tokens))
        if len(tokens) == 3:
            break
    assert len(texts) == 3
    again = []
    for token in remote.stream(IDS, 3, Sampling(temperature=1.0, seed=3)):
        again.append(token)
    assert again == tokens, "the seed decides"
    assert remote.decode(remote.encode("plain text")) == "plain text"


def test_control_tokens_are_text_unless_asked(remote: Remote) -> None:
    assert remote.encode("<|endoftext|>", special=True) == [0]
    assert len(remote.encode("<|endoftext|>")) > 1


def test_the_model_agrees_with_itself(remote: Remote) -> None:
    agreement = compare(remote, remote, [IDS, IDS[::-1]])
    assert agreement.kl == 0
    assert agreement.top1_agreement == 1
    assert agreement.perplexity_ratio == 1
    assert agreement.tokens == 2 * len(IDS) - 2
    told = continue_both(remote, remote, "plain", 4)
    assert told.source == told.artifact


def test_what_dies_is_told_in_one_line(tiny_model: Path) -> None:
    with Remote(tiny_model, 64) as opened:
        os.kill(opened._process.pid, signal.SIGKILL)
        with pytest.raises(ArtifactError, match=r"^transformers was ended by signal 9 while it read .*tiny"):
            opened.logits(IDS)


def test_chat_answers_and_ends(tiny_model: Path, launch: Launch) -> None:
    told = launch("chat", tiny_model, "--prompt", "hello", "--max-tokens", "5", "--temperature", "0")
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip()
    assert "tokens" in told.stderr


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "holds no model"),
        (["a.gguf", "b.gguf"], "name the one you mean"),
        (["adapter_config.json"], "merge it"),
    ],
)
def test_a_folder_that_is_no_model_says_so(tmp_path: Path, files: list[str], words: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=words):
        locate(tmp_path)
