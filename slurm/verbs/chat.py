"""`launch.py chat`: talk to any artifact in the terminal."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hpc.runtimes.remote import Remote
    from hpc.runtimes.runner import Sampling


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Answer this and end; otherwise lines are read until the input ends.")
@click.option("--system", metavar="TEXT", help="What a model with a chat template is told before the first question.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option(
    "--temperature", default=0.7, show_default=True, type=click.FloatRange(0), help="0: always the likeliest."
)
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same answers.")
@click.option("--context", default=2048, show_default=True, type=click.IntRange(16), help="Tokens to keep in mind.")
@click.option("--threads", default=None, type=click.IntRange(1), help="Cores for llama.cpp; all by default.")
def chat(
    artifact: Path, prompt: str | None, system: str | None, max_tokens: int, temperature: float, seed: int,
    context: int, threads: int | None,
) -> None:  # fmt: skip
    """Talk to a model: a .gguf file, an MLX or transformers folder, or a finished stage (RUN/stages/STAGE).

    Its own runtime answers, word by word. A model without a chat template continues what you write. Ctrl-C ends an
    answer, an empty line or Ctrl-D the conversation.
    """
    from hpc.runtimes.remote import Remote
    from hpc.runtimes.runner import Sampling

    with Remote(artifact, context, threads) as model:
        talk = _Talk(model, system, max_tokens, Sampling(temperature, seed=seed), context)
        if prompt is not None:
            talk.answer(prompt)
            return
        held = model.memory_bytes()
        size = f", {held / 1e6:,.0f} MB in memory" if held else ""
        click.echo(f"{model.path}: {model.runtime}{size}, loaded in {model.load_seconds:.1f} s", err=True)
        if not talk.has_template:
            click.echo("no chat template: it continues what you write", err=True)
        for line in _lines():
            with suppress(KeyboardInterrupt):
                talk.answer(line)


def _lines() -> Iterator[str]:
    """What the user says, until an empty line or the end of the input."""
    while True:
        if sys.stdin.isatty():
            click.secho("> ", bold=True, nl=False)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line


class _Talk:
    """A conversation so far."""

    def __init__(
        self, model: "Remote", system: str | None, max_tokens: int, sampling: "Sampling", context: int
    ) -> None:
        self._model, self._sampling = model, sampling
        self._max_tokens, self._context = max_tokens, context
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = []
        self.has_template = model.chat_prompt([{"role": "user", "content": "?"}]) is not None

    def answer(self, text: str) -> None:
        """Print the answer as it is made, then its speed."""
        self._messages.append({"role": "user", "content": text})
        ids = self._prompt(text)
        before = replace(self._model.writing)
        new: list[int] = []
        shown = ""
        try:
            for token in self._model.stream(ids, min(self._max_tokens, self._context - len(ids)), self._sampling):
                new.append(token)
                whole = self._model.decode(new)
                if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of several tokens is not complete
                    click.echo(whole[len(shown) :], nl=False)
                    shown = whole
        finally:
            click.echo()
            self._messages.append({"role": "assistant", "content": shown})
            tokens = self._model.writing.tokens - before.tokens
            seconds = self._model.writing.seconds - before.seconds
            speed = f", {tokens / seconds:,.1f} tokens/s" if tokens else ""
            click.secho(f"[{len(new)} tokens{speed}]", dim=True, err=True)

    def _prompt(self, text: str) -> list[int]:
        """Ids of what the model sees: the whole conversation, without its oldest turns where it is too long."""
        if not self.has_template:
            return self._model.encode(text)[-self._context // 2 :]
        while True:
            ids = self._model.encode(self._model.chat_prompt(self._system + self._messages) or text, special=True)
            if len(ids) + min(self._max_tokens, self._context // 2) <= self._context or len(self._messages) < 3:
                return ids[: self._context - 1]
            del self._messages[:2]
            click.secho("[the oldest question and answer no longer fit --context: forgotten]", dim=True, err=True)
