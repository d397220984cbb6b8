"""The door to DeepSpeed."""

from pathlib import Path

from hpc.config.load import load_config
from hpc.train.engine import deepspeed_config


def test_expert_parallelism_is_asked_for_by_the_key_that_deepspeed_reads(root: Path) -> None:
    settings = load_config(root / "configs/quickstart.yaml").stage("pretrain").train  # type: ignore[union-attr]
    config = deepspeed_config(settings, "fp32")
    assert config["expert_parallel"]["autoep_size"] == 2
    assert config["zero_optimization"]["stage"] == 1
    assert "bf16" not in config
    assert deepspeed_config(settings, "bf16")["bf16"] == {"enabled": True}


def test_an_experts_overlay_wins_over_our_keys(root: Path) -> None:
    overlay = "stages.pretrain.train.deepspeed={gradient_clipping: 7.0}"
    settings = load_config(root / "configs/quickstart.yaml", [overlay]).stage("pretrain").train  # type: ignore[union-attr]
    assert deepspeed_config(settings, "fp32")["gradient_clipping"] == 7.0


def test_the_shim_for_autoep_is_still_needed() -> None:
    """When this fails, transformers takes string keys again, or DeepSpeed asks otherwise: delete `_apply_autoep_shim`."""
    import inspect

    import deepspeed
    from transformers.utils import output_capturing

    asks = [
        path.read_text()
        for path in Path(deepspeed.__file__).parent.glob("module_inject/auto_ep*.py")
        if "_CAN_RECORD_REGISTRY" in path.read_text()
    ]
    assert asks, "DeepSpeed does not read the registry any more"
    original = inspect.getsource(output_capturing._CanRecordRegistry)
    assert "def get(self, model" in original
