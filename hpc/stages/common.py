"""What several stages do in the same way."""

import json
import shutil
from pathlib import Path
from typing import Any

from hpc.data.tokenizer import FILES


def token_facts(tokens: Path) -> dict[str, Any]:
    """tokens.json of a `prepare` stage: vocab_size, end_of_text_id, tokens and bytes of each part."""
    facts: dict[str, Any] = json.loads((tokens / "tokens.json").read_text(encoding="utf-8"))
    return facts


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Take a tokenizer along with a model."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
