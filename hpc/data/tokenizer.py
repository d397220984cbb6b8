"""A byte-level BPE tokenizer (GPT-2 style), trained here or taken over, kept as a Hugging Face tokenizer folder."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hpc.errors import DataError

END_OF_TEXT = "<|endoftext|>"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def train_tokenizer(documents: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Train a byte-level BPE (arXiv:1508.07909 on bytes) of exactly at most `vocab_size` entries and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return tokenizer


def copy_tokenizer(source: Path, folder: Path) -> Tokenizer:
    """Take an existing tokenizer folder over. Raises DataError when there is no readable one."""
    if not (source / "tokenizer.json").is_file():
        raise DataError(f"tokenizer.path: {source} holds no tokenizer.json: name a Hugging Face tokenizer folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json of a folder. Raises DataError."""
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"{folder / 'tokenizer.json'} is not a tokenizer that the tokenizers library reads: {error}"
        ) from None


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of a folder's tokenizer.json: the same text becomes the same ids where it is the same."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def end_of_text_id(tokenizer: Tokenizer, folder: Path) -> int:
    """Id of the token that ends a document: the folder's eos_token. Raises DataError when it has none."""
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    token = config.get("eos_token") or END_OF_TEXT
    text = token["content"] if isinstance(token, dict) else token
    number = tokenizer.token_to_id(text)
    if number is None:
        raise DataError(
            f"the tokenizer in {folder} has no end-of-text token {text!r}: set eos_token in its tokenizer_config.json"
        )
    return int(number)
