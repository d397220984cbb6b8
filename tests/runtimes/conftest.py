"""A small Mixtral with a tokenizer and a chat template, from random weights."""

from pathlib import Path

import pytest
from transformers import MixtralConfig

from hpc.data.tokenizer import train_tokenizer
from hpc.model.build import build_model

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of half a megabyte."""
    folder = tmp_path_factory.mktemp("tiny")
    text = Path(__file__).read_text(encoding="utf-8") * 4
    train_tokenizer([text], 320, folder)
    config = MixtralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, eos_token_id=0, bos_token_id=None,
        max_position_embeddings=128, rope_theta=5e4, initializer_range=0.2,
    )  # fmt: skip
    build_model(config, seed=1).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder
