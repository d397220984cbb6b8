"""The runner of MLX folders against transformers: logits, text, tokenizer, chat template."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from hpc.errors import ArtifactError
from hpc.runtimes.mlx_runner import Mlx
from hpc.runtimes.runner import Runner, Sampling
from hpc.shrink.mlx_export import export
from tests.shrink.tiny import TEXT, ids_of, save, tiny_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE in 4 bits, by a converter in a process of its own, as users get it."""
    folder = tmp_path_factory.mktemp("exported")
    export(save(tiny_model("qwen3_moe"), folder / "source"), folder / "mlx", "4bit", folder / "scratch", group_size=32)
    return folder / "mlx"


@pytest.fixture(scope="module")
def runner(exported: Path) -> Mlx:
    return Mlx(exported)


def test_ids_and_text_are_those_of_the_sources_tokenizer(runner: Runner, exported: Path) -> None:
    oracle = Tokenizer.from_file(str(exported.parent / "source" / "tokenizer.json"))
    text = "The people <|endoftext|> of 1789, naïve:\n  {x}"
    assert runner.encode(TEXT) == oracle.encode(TEXT, add_special_tokens=False).ids
    assert runner.decode(runner.encode("  two spaces , and a comma")) == "  two spaces , and a comma"
    special = runner.encode(text, special=True)
    assert special == oracle.encode(text, add_special_tokens=False).ids
    assert 0 in special
    assert 0 not in runner.encode(text)
    assert runner.decode(runner.encode(text)) == text
    assert runner.decode(special) == text.replace("<|endoftext|>", "")


def test_greedy_text_is_that_of_its_own_logits_and_ends_before_the_end_token(runner: Mlx) -> None:
    prompt = ids_of(9)[0].tolist()
    greedy = list(runner.stream(prompt, 12, Sampling()))
    assert greedy == list(runner.stream(prompt, 12, Sampling()))
    ids = list(prompt)
    for token in greedy:
        assert token == int(runner.logits(ids)[-1].argmax())
        ids.append(token)
    assert len(greedy) == 12
    assert len(list(runner.stream(prompt, 3, Sampling()))) == 3
    runner._tokenizer.eos_token_ids = {greedy[5]}
    try:
        assert list(runner.stream(prompt, 12, Sampling())) == greedy[: greedy.index(greedy[5])]
    finally:
        runner._tokenizer.eos_token_ids = {0}


def test_drawn_text_depends_on_the_seed_alone_and_keeps_to_the_most_likely(runner: Runner) -> None:
    prompt = ids_of(9)[0].tolist()
    drawn = [list(runner.stream(prompt, 12, Sampling(1.0, 40, seed))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    first = {next(runner.stream(prompt, 1, Sampling(5.0, 3, seed))) for seed in range(12)}
    likely = runner.logits(prompt)[-1].argsort()[-3:]
    assert first <= {int(token) for token in likely}
    assert len(first) > 1
    assert len(list(runner.stream(prompt, 2, Sampling(1.0, 10_000, 1)))) == 2


def test_the_chat_template_is_the_sources(runner: Runner) -> None:
    messages = [{"role": "user", "content": "Who?"}]
    assert runner.chat_prompt(messages) == "<user> Who?\n<assistant> "


def test_logits_cover_every_position_and_the_weights_are_held_packed(runner: Runner, exported: Path) -> None:
    ids = ids_of(40)[0].tolist()
    logits = torch.from_numpy(runner.logits(ids))
    assert logits.shape == (40, runner.vocab_size)
    assert torch.allclose(logits[:17], torch.from_numpy(runner.logits(ids[:17])), atol=1e-4)
    held = sum(path.stat().st_size for path in exported.glob("*.safetensors"))
    assert runner.memory_bytes() == pytest.approx(held, rel=0.2)


def test_a_folder_that_mlx_cannot_load_is_told_in_one_line(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no config"):
        Mlx(tmp_path)
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    with pytest.raises(ArtifactError, match="mlx-lm cannot load it"):
        Mlx(tmp_path)
