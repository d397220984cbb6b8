"""Conversations: rendered by the tokenizer's chat template, and which of their tokens are answers to learn from.

A record is {"messages": [{"role", "content"}, ...]} or {"prompt", "completion"}. What the template adds up to an
assistant's message belongs to the prompt; the message and what closes it is the answer.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hpc.errors import DataError

TEMPLATE = "chat_template.jinja"
PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""For tokenizers that bring no template: roles in words, a line each."""

Message = dict[str, str]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    answers: list[tuple[int, int]]
    """First and last + 1 character of each answer."""


def messages_of(record: Any) -> list[Message] | None:
    """The messages of a record, None when it is not a conversation."""
    if isinstance(record, dict) and isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["completion"]}]
    found = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(found, list) or not found:
        return None
    messages = [
        {"role": message["role"], "content": message["content"]}
        for message in found
        if isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    ]
    return messages if len(messages) == len(found) else None


def to_document(messages: list[Message]) -> str:
    """A conversation as one string: what the split into training and held-out parts hashes."""
    return json.dumps(messages, ensure_ascii=False)


@lru_cache(maxsize=4)
def template_of(tokenizer: Path) -> Any:
    """The chat template of a tokenizer folder, or the plain one. Raises DataError when it cannot be read."""
    text = PLAIN
    if (tokenizer / TEMPLATE).is_file():
        text = (tokenizer / TEMPLATE).read_text(encoding="utf-8")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(text)
    except TemplateError as error:
        raise DataError(f"{tokenizer / TEMPLATE} is not a template that can be read: {error}") from None


def _refuse(message: str) -> None:
    raise TemplateError(message)


def render(document: str, tokenizer: Path) -> Rendered:
    """The text of a conversation, and where its answers are. Raises DataError when the template does not suit it."""
    messages: list[Message] = json.loads(document)
    template = template_of(tokenizer)
    answers = []
    try:
        text = str(template.render(messages=messages, add_generation_prompt=False))
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = str(template.render(messages=messages[:number], add_generation_prompt=True))
            until = str(template.render(messages=messages[: number + 1], add_generation_prompt=False))
            if not (until.startswith(prompt) and text.startswith(until)):
                raise DataError(
                    "the chat template writes earlier turns in another way once an answer follows, so answers cannot "
                    f"be told from prompts: give {TEMPLATE} that only appends"
                )
            answers.append((len(prompt), len(until)))
    except (TemplateError, SecurityError, TypeError) as error:
        raise DataError(f"the chat template refuses a conversation that begins {document[:60]}: {error}") from None
    return Rendered(text, answers)


def answer_mask(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token that begins inside an answer, else 0. offsets: first and last + 1 character of each token.

    A conversation's first token never counts: packed, what stands before it is the end of another conversation.
    """
    mask = [0] * len(offsets)
    starts = [first for first, _ in offsets]
    for first, last in answers:
        for token in range(bisect_left(starts, first), bisect_left(starts, last)):
            mask[token] = 1
    if mask:
        mask[0] = 0
    return mask
