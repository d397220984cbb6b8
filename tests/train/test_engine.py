"""The door to DeepSpeed."""

import subprocess
import sys
from pathlib import Path

import deepspeed

from hpc.config.load import load_config
from hpc.train.deepspeed_config import deepspeed_config


def test_expert_parallelism_is_asked_for_by_the_key_that_deepspeed_reads(root: Path) -> None:
    settings = load_config(root / "configs/quickstart.yaml").stage("pretrain").train
    config = deepspeed_config(settings, "fp32", "qwen3_moe", "cpu", 10**9)
    assert config["expert_parallel"]["autoep_size"] == 2
    assert config["zero_optimization"]["stage"] == 1
    assert "bf16" not in config
    assert deepspeed_config(settings, "fp32", "olmoe", "cpu", 10**9)["expert_parallel"]["preset_model"] == "qwen3_moe"
    assert deepspeed_config(settings, "bf16", "qwen3_moe", "cpu", 10**9)["bf16"] == {"enabled": True}


def test_an_experts_overlay_wins_over_our_keys(root: Path) -> None:
    overlay = "stages.pretrain.train.deepspeed={gradient_clipping: 7.0}"
    settings = load_config(root / "configs/quickstart.yaml", [overlay]).stage("pretrain").train
    assert deepspeed_config(settings, "fp32", "qwen3_moe", "cpu", 10**9)["gradient_clipping"] == 7.0


def test_the_shim_for_autoep_is_still_needed() -> None:
    """When this fails, DeepSpeed and transformers agree again: delete `apply_autoep_shim`."""
    code = """
from transformers.utils import output_capturing
try:
    output_capturing._CAN_RECORD_REGISTRY.get("a.module.path", None)
except (TypeError, AttributeError):
    print("still needed")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "still needed", result.stderr
    callers = Path(deepspeed.__file__).parent.rglob("*.py")
    assert any("_CAN_RECORD_REGISTRY" in path.read_text(errors="replace") for path in callers)
