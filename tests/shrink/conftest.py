"""Converted models, each made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc.shrink.gguf_convert import convert
from tests.shrink import wide

Converted = Callable[[str], tuple[Any, Path, Path]]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Architecture -> its random model, the transformers folder, and that as a .gguf file in f32.

    In f16, one token in some hundred goes to another expert: random routers are all but undecided.
    """
    pytest.importorskip("xllamacpp")
    root = tmp_path_factory.mktemp("gguf")
    tokenizer = wide.tokenizer_in(root / "tokenizer")
    made: dict[str, tuple[Any, Path, Path]] = {}

    def get(kind: str) -> tuple[Any, Path, Path]:
        if kind not in made:
            model = wide.save(kind, root / kind, tokenizer)
            convert(root / kind, root / f"{kind}.gguf", "f32")
            made[kind] = model, root / kind, root / f"{kind}.gguf"
        return made[kind]

    return get
