"""A checkpoint of two ranks with experts apart becomes a model that plain transformers loads, with the same logits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpc.errors import ArtifactError
from hpc.model.build import empty_model, model_config
from hpc.train.export import export_checkpoint
from tests.train.exactness import data, settings_for
from tests.train.test_exactness import launch

FRESH_LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.tensor(json.loads(sys.argv[2]))
print(json.dumps(model(ids).logits.flatten().tolist()))
"""


CASES = [
    "2/1/clip/1/qwen3_moe/adam/aux",
    pytest.param("2/3/clip/1/mixtral/adam/aux", marks=pytest.mark.slow),
    pytest.param("2/1/clip/1/deepseek_v3/adam/aux", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES)
def test_an_exported_checkpoint_has_the_logits_of_the_engine(tmp_path: Path, case: str) -> None:
    curves = launch(2, tmp_path, [case], "--last", 2, "--save", tmp_path / "checkpoints")[case]
    folder = tmp_path / "checkpoints/step-00000002"
    settings = settings_for(case, 2)
    config = model_config(settings.model, settings.router, 64, 64, 0)
    census = export_checkpoint(folder, empty_model(config), config, tmp_path / "model")
    assert sorted(census["experts"]["xxh3_64_by_layer"]) == (["1"] if "deepseek" in case else ["0", "1"])
    ids = json.dumps(data()[0, :1, :-1].tolist())
    command = [sys.executable, "-c", FRESH_LOGITS, str(tmp_path / "model"), ids]
    plain = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout)
    difference = (torch.tensor(plain) - torch.tensor(curves["logits"])).abs().max()
    print(f"logits within {difference:.1e} of the engine's, which are up to {torch.tensor(plain).abs().max():.1f}")
    assert difference < 1e-5

    shard = folder / "fragments-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match=r"cannot be exported: fragments-00001.safetensors is missing, cut off"):
        export_checkpoint(folder, empty_model(config), config, tmp_path / "again")
    assert not (tmp_path / "again").exists()
