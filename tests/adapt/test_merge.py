"""Adapters as peft knows them, folded into their base: exact, expert by expert, alone or several together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MixtralConfig

from hpc.adapt.lora import attach, base_name, choose_experts, save_adapter
from hpc.adapt.merge import merge
from hpc.config.train import AdapterTraining, ExpertChoice
from hpc.errors import ArtifactError, ConfigError
from hpc.model.adapters import adapted_layers
from hpc.model.build import empty_model, load_config, load_model
from hpc.model.experts import use_backend
from hpc.model.routing import PASSPORT

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.arange(40).view(1, 40) * 7 % 64
SETTINGS = AdapterTraining.model_validate(
    {"rank": 3, "alpha": 6, "steps": 1, "optimizer": {"lr": 1e-3},
     "batches": {"seq_len": 8, "micro_batch_size": 1, "tokens_per_step": 8}}
)  # fmt: skip


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "base"
    torch.manual_seed(0)
    config = MixtralConfig(**SHAPE, num_local_experts=4, initializer_range=0.1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, seed: int, *, zero: bool = False, chosen: Any = None) -> torch.Tensor:
    """Write an adapter with random B; returns the logits of base + adapter as we compute them in training."""
    loaded = load_model(base).state_dict()
    model: Any = attach(empty_model(load_config(base)), SETTINGS, seed, chosen=chosen)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            known = base_name(name)
            if known is not None:
                parameter.copy_(loaded[known])
            elif not zero and (".lora_B." in name or name.endswith(".B")):
                parameter.normal_(std=0.1)
        for number, (_, _, adapters) in enumerate(adapted_layers(model)):  # what training leaves of the others
            for expert in set(range(4)) - set(range(4) if chosen is None else chosen[number]):
                adapters.gate_up.B[expert] = adapters.down.B[expert] = 0.0
    state = {name: p.detach() for name, p in model.named_parameters() if base_name(name) is None}
    save_adapter(state, SETTINGS, folder, has_experts=any(".adapter." in name for name in state))
    use_backend(model, "grouped_mm")
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def test_peft_computes_with_our_adapter_what_training_did(moe: Path, tmp_path: Path) -> None:
    ours = adapter(moe, tmp_path / "a", seed=1)
    base = load_model(moe).eval()
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()(input_ids=IDS).logits
    assert float((theirs - ours).abs().max()) < 1e-5
    assert float((theirs - plain).abs().max()) > 0.1


def test_a_merged_model_is_base_and_adapter_with_every_expert_changed(moe: Path, tmp_path: Path) -> None:
    wanted = adapter(moe, tmp_path / "a", seed=1)
    merged = merge(load_model(moe).eval(), [(tmp_path / "a", 1.0)], IDS, "linear", 0.5, 0)
    with torch.no_grad():
        assert float((merged.model(input_ids=IDS).logits - wanted).abs().max()) < 1e-5
    assert merged.difference is not None
    assert merged.difference.absolute < 1e-5
    assert merged.difference.precision == "float64"
    assert merged.changed == {"experts": (16, 16), "others": (8, 8)}


def test_a_sum_of_adapters_is_the_sum_of_what_they_change(moe: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        adapter(moe, tmp_path / str(seed), seed)
    merged = merge(load_model(moe).eval(), [(tmp_path / "1", 0.7), (tmp_path / "2", -0.2)], IDS, "linear", 0.5, 0)
    assert merged.difference is not None
    assert merged.difference.absolute < 1e-5
    assert merged.difference.precision == "float64"
    alone = [merge(load_model(moe), [(tmp_path / str(n), 1.0)], IDS, "linear", 0.5, 0).model for n in (1, 2)]
    name = "model.layers.1.mlp.experts.down_proj"
    first, second, both, base = (m.state_dict()[name] for m in (*alone, merged.model, load_model(moe)))
    assert torch.allclose(both - base, 0.7 * (first - base) - 0.2 * (second - base), atol=1e-6)


def test_ties_keeps_the_larger_half_of_each_expert_and_where_signs_agree(moe: Path, tmp_path: Path) -> None:
    adapter(moe, tmp_path / "1", 1)
    one = merge(load_model(moe), [(tmp_path / "1", 1.0)], IDS, "linear", 0.5, 0).model.state_dict()
    ties = merge(load_model(moe), [(tmp_path / "1", 1.0)], IDS, "ties", 0.25, 0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    base = load_model(moe).state_dict()[name]
    whole, kept = one[name] - base, ties.model.state_dict()[name] - base
    for expert in range(4):
        wanted = whole[expert].abs() >= whole[expert].abs().flatten().kthvalue(int(0.75 * whole[expert].numel()) + 1)[0]
        assert torch.allclose(kept[expert], whole[expert] * wanted, atol=1e-6)
    assert ties.difference is None


def test_only_chosen_experts_change(moe: Path, tmp_path: Path) -> None:
    """The passport says where tokens went; half of each layer's experts are adapted, and only those are merged."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / PASSPORT).write_text(json.dumps({"assignments": [[5, 1, 9, 2], [3, 8, 7, 1]]}))
    chosen = choose_experts(ExpertChoice(top_loaded=0.5), tmp_path / "base", 4)
    assert chosen == {0: [0, 2], 1: [1, 2]}
    wanted = adapter(moe, tmp_path / "a", seed=1, chosen=chosen)
    merged = merge(load_model(moe).eval(), [(tmp_path / "a", 1.0)], IDS, "linear", 0.5, 0)
    assert merged.changed["experts"] == (8, 16)
    with torch.no_grad():
        assert float((merged.model(input_ids=IDS).logits - wanted).abs().max()) < 1e-5
    with pytest.raises(ArtifactError, match="has none: take named experts"):
        choose_experts(ExpertChoice(top_loaded=0.5), moe, 4)
    with pytest.raises(ConfigError, match="expert 4 of 4"):
        choose_experts(ExpertChoice(named={0: [4]}), moe, 4)


LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 12,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "initializer_range": 0.1, "num_mtp_layers": 0,
}  # fmt: skip


@pytest.mark.parametrize("query_rank", [16, None])
def test_latent_attention_is_adapted_in_all_its_matrices(query_rank: int | None, tmp_path: Path) -> None:
    """DeepSeek-V3: two for queries, or one, two for keys and values, and the output, in three layers."""
    torch.manual_seed(0)
    config = DeepseekV3Config(**{**SHAPE, **LATENT, "num_hidden_layers": 3}, q_lora_rank=query_rank)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    wanted = adapter(tmp_path / "base", tmp_path / "a", 1)
    merged = merge(load_model(tmp_path / "base").eval(), [(tmp_path / "a", 1.0)], IDS, "linear", 0.5, 0)
    number = 3 * (5 if query_rank else 4)
    assert merged.changed == {"experts": (2 * 2 * 4, 2 * 2 * 4), "others": (number, number)}
    with torch.no_grad():
        assert float((merged.model(input_ids=IDS).logits - wanted).abs().max()) < 1e-5
    written = set(json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"])
    queries = {"q_a_proj", "q_b_proj"} if query_rank else {"q_proj"}
    assert written == queries | {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


def test_an_adapter_that_changes_nothing_is_refused(moe: Path, tmp_path: Path) -> None:
    adapter(moe, tmp_path / "a", seed=1, zero=True)
    with pytest.raises(ArtifactError, match="does not change the model"):
        merge(load_model(moe), [(tmp_path / "a", 1.0)], IDS, "linear", 0.5, 0)


def test_a_dense_model_is_adapted_in_its_feed_forward_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True, initializer_range=0.1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    wanted = adapter(tmp_path / "base", tmp_path / "a", 1)
    merged = merge(load_model(tmp_path / "base").eval(), [(tmp_path / "a", 1.0)], IDS, "linear", 0.5, 0)
    assert merged.changed == {"experts": (0, 0), "others": (14, 14)}
    with torch.no_grad():
        assert float((merged.model(input_ids=IDS).logits - wanted).abs().max()) < 1e-5
