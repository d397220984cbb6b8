"""Whether a runtime makes the ids of a text that the model's own tokenizer makes.

With another rule for cutting a text into words a model answers a little worse, and nothing fails.
"""

from collections.abc import Iterable
from pathlib import Path

from hpc.data.tokenizer import load_tokenizer
from hpc.errors import ArtifactError
from hpc.runtimes.runner import Runner

PROBES = (
    "The quick brown fox, aged 12, jumped over 3,141,592 dogs; didn't it? I'll say WE'VE seen 'em -- they're 1st.",
    "    def f(x):\n\t\treturn {'a': [1, 22, 333, 4444], \"b\": x ** 2}  # why?\r\n\r\n\n\n   end  \n",
    "Größe, naïve café, cafe\u0301, señor; Ελληνικά, русский текст, עברית, العربية, हिन्दी, ไทย.",
    "中文字符和标点，測試。日本語のカタカナ。한국어 문장. 🚀👩‍👩‍👧 ½ ² ™ § €42.50 \u00a0\u2003\u200b—…",
    "https://example.org/a_b?c=%20&d=e#f <tag attr='v'>x</tag> $\\alpha_{i}^2$ a+b==c&&d||!e ~/.config C++17 v1.2-rc4",
)


def check_tokens(runner: Runner, tokenizer: Path, texts: Iterable[str]) -> None:
    """Texts have to become the same ids in a runtime and in a tokenizer folder, and the same text again.

    Raises ArtifactError that shows where they part.
    """
    original = load_tokenizer(tokenizer)
    for text in texts:
        wanted = original.encode(text, add_special_tokens=False).ids
        found = runner.encode(text)
        if found == wanted:
            back = runner.decode(found)
            if back == original.decode(wanted, skip_special_tokens=True):
                continue
            raise ArtifactError(f"ids of {text[:40]!r} become {back[:40]!r} again in the artifact, not what they were")
        place = next((n for n, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), -1)
        near = original.decode(wanted[max(0, place - 2) : place + 3])
        raise ArtifactError(
            f"the artifact cuts text into other tokens than the model's tokenizer, near {near!r}: its pre-tokenizer is "
            "not among those that the runtime knows; train with a tokenizer of GPT-2's kind"
        )


def check_special(runner: Runner, tokenizer: Path) -> None:
    """Control tokens inside a text, as a chat template writes them. Raises ArtifactError."""
    for number, token in load_tokenizer(tokenizer).get_added_tokens_decoder().items():
        if token.special and number not in runner.encode(f"a{token.content}b", special=True):
            raise ArtifactError(f"the artifact does not know the token {token.content!r} of the model's tokenizer")
