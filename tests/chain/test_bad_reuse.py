"""What a user can get wrong with models that exist: one line with a way out and a documented exit code, in no time."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from hpc.config.train import Finetuning
from hpc.errors import ConfigError, DataError
from hpc.run.directory import write_json
from hpc.stages.common import check_fit
from launch import main

BATCHES = {"seq_len": 64, "micro_batch_size": 2, "tokens_per_step": 512}
TRAIN: dict[str, Any] = {"batches": BATCHES, "steps": 8, "optimizer": {"lr": 2e-3}}
SHAPE = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 2, "expert_size": 64}
MOE = {**TRAIN, "model": SHAPE, "router": {"num_experts": 4, "top_k": 2}}
CHAIN: dict[str, dict[str, Any]] = {
    "model": {"kind": "reuse", "init": {"from": "HERE"}},
    "text": {"kind": "prepare", "needs": ["model"], "sources": [{"files": ["*.txt"]}]},
    "pretrain": {"kind": "pretrain", "needs": ["text"], "train": MOE},
    "lora": {"kind": "lora", "needs": ["model", "text"], "train": {**TRAIN, "rank": 4, "alpha": 8}},
    "merge": {"kind": "merge", "needs": ["model", "lora"]},
}


def told(folder: Path, verb: str, stages: dict[str, dict[str, Any]]) -> tuple[int, str]:
    """Exit code and what `launch.py VERB` writes to stderr."""
    listed = [{"name": name, **stage} for name, stage in stages.items()]
    config = {"name": "x", "run_root": str(folder), "tracking": {"wandb": "disabled"}, "stages": listed}
    (folder / "x.yaml").write_text(yaml.safe_dump(config, sort_keys=False).replace("HERE", str(folder)))
    result = CliRunner().invoke(main, [verb, str(folder / "x.yaml")])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    [
        ("pretrain", {"init": {"from": "HERE"}}, "pretrain begins with random weights: use kind: finetune, or kind: r"),
        (
            "merge",
            {"weights": {"lorra": 1.0}},
            "weights names 'lorra', which the stage does not need; did you mean 'lo",
        ),
        ("merge", {"weights": {"lora": 0.0}}, "weights.lora = 0 leaves the adapter out: drop it from needs"),
        ("merge", {"combination": "sum"}, "'sum': input should be 'linear', 'ties', 'dare_linear' or 'dare_ties'"),
        ("merge", {"density": 0}, "density: 0: input should be greater than 0"),
        ("merge", {"needs": ["model"]}, "(merge) needs a stage that produces adapter"),
        ("lora", {"matrix": {"task": ["a", "b"]}, "needs": ["model", "text-{tsak}"]}, "needs 'text-{tsak}', which is"),
        ("lora", {"train": {**TRAIN, "parallel": {"ranks_per_node": 2, "expert_parallel_size": 3}}}, "a divisor of 2"),
        (
            "model",
            {"upcycle": {"num_experts": 6, "granularity": 4}},
            "num_experts = 6 is not a multiple of granularity",
        ),
        ("model", {"upcycle": {"num_experts": 8, "granularity": 2, "shared": 2}}, "leaves nothing of granularity = 2"),
        ("model", {"init": {"from": "HERE", "revision": "main"}}, "revision = 'main' is for a Hub model, not for /"),
        ("model", {"init": {"from": "HERE", "sha256": "0" * 64}}, "sha256 is for one .gguf file, not for /"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_when_it_is_loaded(
    stage: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    stages = copy.deepcopy(CHAIN)
    stages[stage] |= change
    code, text = told(tmp_path, "plan", stages)
    assert code == 2, text
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert words in text


def test_a_model_that_is_not_here_says_where_to_fetch_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def no_network(**options: Any) -> str:
        if options.get("local_files_only"):
            raise FileNotFoundError
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    code, text = told(tmp_path, "run", {"model": {"kind": "reuse", "init": {"from": "acme/tiny", "revision": "v2"}}})
    assert code == 3
    assert "(name or service not known)" in text
    assert "run `hf download acme/tiny --revision v2 --local-dir DIR` where there is a network" in text
    assert text.count("\n") == 1
    code, text = told(tmp_path, "plan", {"model": {"kind": "reuse", "init": {"from": "/none"}}})
    assert code == 3
    assert "x.yaml:" in text
    assert "there is no '/none'" in text


def fits(folder: Path, entries: int, group: int, **config: int) -> None:
    """check_fit of a model with that configuration, on text with so many entries of vocabulary."""
    write_json(folder / "tokens.json", {"vocab_size": entries})
    context: Any = SimpleNamespace(inputs=lambda kind: [("base" if kind == "model" else "text", folder)])
    parallel = {"ranks_per_node": group, "expert_parallel_size": group}
    settings = Finetuning.model_validate(
        {**TRAIN, "batches": {**BATCHES, "tokens_per_step": 768}, "parallel": parallel}
    )
    check_fit(context, SimpleNamespace(vocab_size=512, **config), settings)


def test_a_layout_or_a_vocabulary_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    fits(tmp_path, 512, 2, num_local_experts=4)
    with pytest.raises(ConfigError, match=r"expert_parallel_size = 2, but 'base' is a dense model: set it to 1"):
        fits(tmp_path, 512, 2)
    with pytest.raises(ConfigError, match=r"= 3 does not divide the 4 experts of 'base': choose a divisor of 4"):
        fits(tmp_path, 512, 3, num_local_experts=4)
    with pytest.raises(DataError, match=r"tokenized with 600 entries, 'base' has embeddings for 512, 88 fewer: let"):
        fits(tmp_path, 600, 1, num_local_experts=4)


DENSE = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "group", "words"),
    [
        ({}, 2, "expert_parallel_size = 2 is for mixtures of experts, and its model is dense: set it to 1"),
        ({"model_type": "mixtral", "num_local_experts": 3}, 2, "= 2 does not divide its 3 experts: choose a divisor"),
    ],
)
def test_the_plan_refuses_expert_parallelism_that_the_model_on_disk_does_not_have(
    more: dict[str, Any], group: int, words: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "config.json", DENSE | more)
    stages = {name: copy.deepcopy(CHAIN[name]) for name in ("model", "text", "lora")}
    stages["lora"]["train"]["parallel"] = {"ranks_per_node": group, "expert_parallel_size": group}
    code, text = told(tmp_path, "plan", stages)
    assert code == 2, text
    assert words in text
    assert text.count("\n") == 1
