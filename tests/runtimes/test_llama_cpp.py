"""llama.cpp behind `Runner`: the model that transformers has, and errors in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc.data.tokenizer import load_tokenizer
from hpc.errors import ArtifactError, ConfigError
from hpc.runtimes import llama_library
from hpc.runtimes.llama_cpp import LlamaCpp
from hpc.runtimes.runner import Runner, Sampling
from tests.shrink import wide
from tests.shrink.conftest import Converted, converted

__all__ = ["converted"]


@pytest.fixture(scope="module")
def model(converted: Converted) -> tuple[Any, Path, Path]:
    return converted("qwen3_moe")


@pytest.fixture(scope="module")
def runner(model: tuple[Any, Path, Path]) -> Runner:
    return LlamaCpp(model[2], context_length=160, threads=1)


def test_text_becomes_the_ids_of_our_tokenizer_and_text_again(runner: Runner, model: Any) -> None:
    text = "  if x == 12345:\n\treturn 'é 你好 🚀'  # isn't\r\n\n"
    assert runner.encode(text) == load_tokenizer(model[1]).encode(text).ids
    assert runner.decode(runner.encode(text)) == text
    assert runner.encode("a<|endoftext|>b", special=True)[1] == 0
    assert len(runner.encode("a<|endoftext|>b")) > 3
    assert runner.decode([0, *runner.encode("a"), 0]) == "a"


def test_greedy_text_is_that_of_transformers_and_the_same_every_time(runner: Runner, model: Any) -> None:
    ids = wide.some_ids()[:20]
    wanted = model[0].generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, 20:].tolist()
    assert list(runner.stream(ids, 12, Sampling())) == list(runner.stream(ids, 12, Sampling())) == wanted


def test_drawn_text_depends_on_its_seed(runner: Runner) -> None:
    ids = wide.some_ids()[:20]
    first, again, other = (list(runner.stream(ids, 12, Sampling(1.0, 40, seed))) for seed in (1, 1, 2))
    assert first == again != other


def test_a_conversation_that_goes_on_reads_its_new_part_only_and_means_the_same(runner: Runner, model: Any) -> None:
    ids = wide.some_ids()
    list(runner.stream(ids[:30], 5, Sampling()))
    going_on = list(runner.stream(ids[:60], 8, Sampling()))
    assert going_on == list(LlamaCpp(model[2], 160, 1).stream(ids[:60], 8, Sampling()))
    assert wide.kl(wide.logits_of(model[0], ids), runner.logits(ids)) < 1e-6  # an empty cache, whatever came before


def test_text_ends_where_the_context_does_and_before_an_end_token(runner: Runner, model: Any, tmp_path: Path) -> None:
    assert len(list(runner.stream(wide.some_ids(), 100, Sampling()))) == 160 - 150 + 1
    with pytest.raises(ConfigError, match=r"^161 ids do not fit the context of 160"):
        list(runner.stream([1] * 160, 5, Sampling()))
    weights = model[2].read_bytes()
    ids = wide.some_ids()[:20]
    made = list(runner.stream(ids, 9, Sampling()))
    last = made[4].to_bytes(4, "little")
    end = b"tokenizer.ggml.eos_token_id" + (4).to_bytes(4, "little")
    assert weights.count(end + bytes(4)) == 1
    (tmp_path / "ends.gguf").write_bytes(weights.replace(end + bytes(4), end + last))
    assert list(LlamaCpp(tmp_path / "ends.gguf", 64, 1).stream(ids, 9, Sampling())) == made[: made.index(made[4])]


def test_the_chat_template_comes_from_the_file(runner: Runner) -> None:
    asked = [{"role": "user", "content": "Hi"}]
    assert runner.chat_prompt(asked) == "<user>Hi\n<assistant>"


def test_memory_is_what_the_tensors_take(runner: Runner, model: Any) -> None:
    told = runner.memory_bytes()
    assert told is not None
    assert 0.9 * model[2].stat().st_size < told < model[2].stat().st_size


def test_a_damaged_file_is_one_line(model: Any, tmp_path: Path) -> None:
    whole = model[2].read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "foreign": b"GGUF" + bytes(64), "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"^llama\.cpp does not load .*{name} \(.+\): export it again$"):
            LlamaCpp(tmp_path / name, 64, 1)


def test_an_expert_set_to_zero_shows_in_the_logits(model: Any, tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "damaged.gguf"
    path.write_bytes(model[2].read_bytes())
    tensor = next(t for t in gguf.GGUFReader(str(path), "r+").tensors if t.name == "blk.1.ffn_down_exps.weight")
    tensor.data[3] = 0
    found = LlamaCpp(path, 160, 1).logits(wide.some_ids())
    assert wide.kl(wide.logits_of(model[0], wide.some_ids()), found) > 1e-3


def test_another_version_of_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(llama_library, "VERSION", "2026.1.1")
    with pytest.raises(ConfigError, match=r"is installed, 2026\.1\.1 is bound: pip install"):
        llama_library.Library()
    monkeypatch.undo()
    monkeypatch.setitem(llama_library.CONTEXT_DEFAULTS, "type_v", 2)
    with pytest.raises(ConfigError, match="has type_v = 1 where 2 is the default"):
        llama_library.Library()


def test_choosing_follows_temperature_and_top_k() -> None:
    from hpc.runtimes.sampling import choose

    logits = np.array([1.0, 3.0, 2.0, -1.0], np.float32)
    random = np.random.default_rng(0)
    assert choose(logits, Sampling(), random) == 1
    drawn = [choose(logits, Sampling(1.0, top_k=2), random) for _ in range(4000)]
    assert set(drawn) == {1, 2}
    assert drawn.count(1) / 4000 == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.03)
