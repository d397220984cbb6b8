"""A few lines of text from a model, for a person to read."""

from hpc.runtimes.runner import Runner, Sampling


def continue_text(model: Runner, prompt: str, num_tokens: int, seed: int) -> str:
    """The prompt and up to `num_tokens` sampled tokens (temperature 0.8, top-k 40), reproducible by `seed`."""
    ids = model.encode(prompt)
    new = list(model.stream(ids, num_tokens, Sampling(temperature=0.8, seed=seed)))
    return model.decode([*ids, *new])
