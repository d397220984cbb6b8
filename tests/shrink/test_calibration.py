"""Calibration text, one layer in memory at a time, and what it says about experts: against the whole model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from hpc.errors import DataError
from hpc.reuse.streamed import streamed_model
from hpc.shrink.calibration import windows
from hpc.shrink.passport import Passport, covered, passport
from hpc.shrink.sensitivity import measure, rounded

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
SHAPES = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, head_dim=32, moe_intermediate_size=32, num_experts=4, mlp_only_layers=[0]),
}
IDS = np.random.default_rng(1).integers(0, 97, (3, 16))


@pytest.fixture(scope="module", params=sorted(SHAPES))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model in memory and on disk."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[request.param], dtype=torch.float32).eval()
    with torch.no_grad():  # routers that prefer some experts
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if ".gate.weight" in name else 3 if parameter.dim() > 1 else 1)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def test_text_is_taken_from_all_over_without_overlap_and_a_short_one_gives_what_it_has() -> None:
    long, short = np.arange(1000), np.arange(5000, 5040)
    found = windows([long, short], 320, 16)
    assert found.shape == (10 + 2, 16)
    assert found[0, 0] == 0
    assert found[9, -1] == 999
    assert len(set(found.flatten().tolist())) == found.size
    with pytest.raises(DataError, match="holds 2000 tokens"):
        windows([long, short], 320, 2000)


def test_a_streamed_model_computes_what_the_whole_one_does_and_keeps_no_layer(models: tuple[Any, Path]) -> None:
    model, folder = models
    streamed, ids = streamed_model(folder), torch.from_numpy(IDS)
    with torch.no_grad():
        for _ in range(2):
            difference = streamed(input_ids=ids).last_hidden_state - model.model(input_ids=ids).last_hidden_state
            assert float(difference.abs().max()) < 1e-5
            assert {parameter.device.type for parameter in streamed.layers.parameters()} == {"meta"}


def test_the_passport_counts_every_choice_and_names_who_saw_too_little(models: tuple[Any, Path]) -> None:
    model, folder = models
    found = passport(streamed_model(folder), IDS, minimum=20)
    assert [sum(layer) for layer in found.counts] == [IDS.size * 2] * len(found.counts)
    assert found.counts == passport(model.model, IDS, 20).counts
    assert found.fewest == min(map(min, found.counts))
    assert [count for _, _, count in found.short] == [n for layer in found.counts for n in layer if n < 20]


def test_text_grows_while_an_expert_sees_too_little_and_no_further_than_the_limit() -> None:
    text = np.arange(100_000)

    def look(ids: Any) -> Passport:
        return Passport(((ids.size // 10, ids.size),), 50)

    def draw(tokens: int) -> Any:
        return windows([text], tokens, 16)

    ids, found = covered(draw, look, 128, 4096)
    assert (ids.size, found.short) == (512, [])
    ids, found = covered(draw, look, 128, 300)
    assert ids.size in (288, 304)
    assert found.short == [(0, 0, ids.size // 10)]


def test_rounding_errors_are_those_of_a_model_with_that_expert_rounded(models: tuple[Any, Path]) -> None:
    model, folder = models
    units = measure(streamed_model(folder), IDS, (3, 8), 32, symmetric=False)
    dense = {name for name, _ in model.named_modules() if name.endswith(("self_attn", "mlp")) and "0.mlp" not in name}
    assert {name for name in dense if name.endswith("self_attn")} <= units.keys()
    assert sum("experts" in name for name in units) in (4, 8)
    for unit in units.values():
        assert unit.errors[3] >= 100 * unit.errors[8]
    name = "model.layers.1.mlp.experts.2"
    assert units[name].parameters == 3 * 64 * 32
    assert units[name].matrices == tuple(f"{name}.{part}_proj" for part in ("gate", "up", "down"))

    experts, layer, ids = model.model.layers[1].mlp.experts, model.model.layers[1], torch.from_numpy(IDS)
    kept = [parameter.detach().clone() for parameter in (experts.gate_up_proj, experts.down_proj)]
    outputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(
        lambda *parts: outputs.append(parts[2][0] if isinstance(parts[2], tuple) else parts[2])
    )
    with torch.no_grad():
        model.model(input_ids=ids)
        for parameter in (experts.gate_up_proj, experts.down_proj):
            parameter[2] = rounded(parameter[2], 3, 32, symmetric=False)
        model.model(input_ids=ids)
        experts.gate_up_proj.copy_(kept[0])
        experts.down_proj.copy_(kept[1])
    handle.remove()
    before, after = outputs
    wanted = float(((after - before).square().sum(-1) / before.square().sum(-1)).sum())
    assert units[name].errors[3] == pytest.approx(wanted, rel=1e-3)
