"""'Did you mean': the nearest right word to a wrong one."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, words: Iterable[str]) -> str:
    """A suffix for an error message: the nearest of `words`, else the list of them."""
    known = list(words)
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; one of: {', '.join(known)}"
