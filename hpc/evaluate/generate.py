"""A few lines of text from a model, for a person to read."""

from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel


def continue_text(model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, num_tokens: int, seed: int) -> str:
    """The prompt and up to `num_tokens` sampled tokens (temperature 0.8, top-k 40), reproducible by `seed`."""
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    torch.manual_seed(seed)
    generate: Any = model.generate
    output = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=True,
        temperature=0.8,
        top_k=40,
        pad_token_id=model.config.eos_token_id,
    )
    return str(tokenizer.decode(output[0].tolist(), skip_special_tokens=True))
