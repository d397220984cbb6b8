"""MLX folders from every architecture, run by MLX and compared with transformers, matrix by matrix and in logits."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from transformers import PreTrainedModel

from hpc.errors import ArtifactError, ConfigError, DataError
from hpc.runtimes.mlx_runner import Mlx
from hpc.shrink import mlx_export
from hpc.shrink.compressed import named_matrices
from hpc.shrink.mlx_convert import Conversion, convert
from hpc.shrink.mlx_export import MLX_TYPES, export
from hpc.shrink.mlx_folder import census, matrices
from tests.shrink.tiny import KINDS, THETA, ids_of, kl, save, tiny_model

Export = Callable[..., Path]
IDS = ids_of(48)


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """Export in this process, to save the start of another one; tests/runtimes/test_mlx.py takes the way users take."""

    def here(wanted: Conversion, _: str) -> None:
        convert(Conversion(**json.loads(wanted.text())))

    def call(source: Path, quantization: str, **more: Any) -> Path:
        out = tmp_path / quantization
        export(source, out, quantization, tmp_path / ".scratch", **{"group_size": 32, **more})
        return out

    monkeypatch.setattr(mlx_export, "_in_fresh_process", here)
    return call


def logits(folder: Path) -> torch.Tensor:
    return torch.from_numpy(Mlx(folder).logits(IDS[0].tolist()))


def worst(model: PreTrainedModel, folder: Path) -> float:
    """Largest error of a matrix relative to its size; none of the source's may be missing."""
    held, errors = dict(matrices(folder)), []
    for name, wanted in named_matrices(model):
        errors.append(float((torch.from_numpy(held[name]) - wanted.detach()).norm() / wanted.detach().norm()))
    return max(errors)


def refilled(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The source with the matrices of an exported folder in place of its own: what MLX must compute with."""
    held, other = dict(matrices(folder)), deepcopy(model)
    with torch.no_grad():
        for name, matrix in named_matrices(other):
            matrix.copy_(torch.from_numpy(held[name]))
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_gives_the_sources_logits_and_matrices(kind: str, tmp_path: Path, exported: Export) -> None:
    model = tiny_model(kind)
    source = save(model, tmp_path / "source")
    whole = exported(source, "f32")
    assert kl(model, logits(whole), IDS) < 1e-6
    assert worst(model, whole) == 0.0
    folder = exported(source, "bf16")
    assert kl(refilled(model, folder), logits(folder), IDS) < 1e-6
    assert worst(model, folder) < 0.004

    for quantization, most, error in (("8bit", 0.01, 0.01), ("4bit", 0.3, 0.12)):
        folder = exported(source, quantization, dtype="float16")
        answers = logits(folder)
        assert kl(refilled(model, folder), answers, IDS) < 1e-6
        assert 1e-5 < kl(model, answers, IDS) < most
        assert 1e-3 < worst(model, folder) < error
        groups = census(folder)
        for name in ("experts", "attention", "embedding and head"):
            if name in groups:
                assert groups[name]["quantized_matrices"] == groups[name]["matrices"]
        if "router" in groups:
            assert groups["router"]["quantized_matrices"] == 0
            assert groups["experts"]["bits_per_weight"] == MLX_TYPES[quantization].bits + 1  # 2 x 16 bits in 32 weights
            sparse_layers = 1 if kind in ("qwen3_moe", "deepseek_v3") else 2
            assert groups["experts"]["matrices"] == sparse_layers * 8 * 3


def test_the_exported_configuration_says_what_transformers_5_keeps_elsewhere(tmp_path: Path, exported: Export) -> None:
    model = tiny_model("mixtral")
    folder = exported(save(model, tmp_path / "source"), "f32")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == THETA
    assert config["num_experts"] == 8
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1e6}))
    assert kl(model, logits(folder), IDS) > 1e-3  # what mlx-lm makes of a configuration without the key


@pytest.mark.parametrize(
    ("kind", "stretch"),
    [
        ("llama", {"rope_type": "linear"}),
        ("llama", {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("deepseek_v3", {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1}),
    ],
)
def test_stretched_positions_are_taken_along(kind: str, stretch: Any, tmp_path: Path, exported: Export) -> None:
    stretch = {"rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 16, **stretch}
    model = tiny_model(kind, rope_parameters=stretch, rope_theta=None)
    assert kl(model, logits(exported(save(model, tmp_path / "source"), "f32")), IDS) < 1e-6


def test_groups_that_were_not_chosen_stay_out_also_where_corrections_are_negative(
    tmp_path: Path, exported: Export
) -> None:
    model = tiny_model("deepseek_v3")
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                tensor.sub_(3.0)
    assert kl(model, logits(exported(save(model, tmp_path / "source"), "f32")), IDS) < 1e-6


def test_bits_by_module_and_mixtures(tmp_path: Path, exported: Export) -> None:
    model = tiny_model("olmoe")
    source = save(model, tmp_path / "source")
    by_module = {"model.layers.1.mlp.experts.down_proj": 8, "model.embed_tokens": 16, "lm_head": 6}
    folder = exported(source, "4bit", bits_by_module=by_module)
    groups, whole = census(folder), census(exported(source, "mixed_4_6"))
    assert groups["experts"]["bits_per_weight"] == pytest.approx(5 + 4 / 6)
    assert groups["embedding and head"]["bits_per_weight"] == pytest.approx((16 + 7) / 2)
    assert groups["embedding and head"]["quantized_matrices"] == 1
    assert worst(model, folder) < 0.12
    assert kl(model, logits(folder), IDS) < 0.3
    assert 5 < whole["experts"]["bits_per_weight"] < 6
    assert whole["router"]["bits_per_weight"] == 16
    assert kl(model, logits(tmp_path / "mixed_4_6"), IDS) < 0.3


def test_one_expert_without_scales_shows_in_its_matrix_and_in_logits(tmp_path: Path, exported: Export) -> None:
    model = tiny_model("mixtral")
    folder = exported(save(model, tmp_path / "source"), "8bit")
    sound, path = logits(folder), folder / "model.safetensors"
    tensors = mx.load(str(path))
    damaged = "model.layers.1.block_sparse_moe.switch_mlp.down_proj.scales"
    tensors[damaged][5] = mx.zeros_like(tensors[damaged][5])
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors, metadata={"format": "mlx"})
    source, held = dict(named_matrices(model)), dict(matrices(folder))

    def error(layer: int, expert: int) -> float:
        name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
        wanted = source[name].detach()
        return float((torch.from_numpy(held[name]) - wanted).norm() / wanted.norm())

    assert error(1, 5) > 0.5
    assert max(error(0, 5), error(1, 4)) < 0.01
    assert (logits(folder) - sound).abs().max() > 0.01


def test_what_mlx_would_compute_otherwise_or_cannot_hold_is_refused(tmp_path: Path, exported: Export) -> None:
    source = save(tiny_model("qwen2_moe", norm_topk_prob=True), tmp_path / "qwen2")
    with pytest.raises(DataError, match="norm_topk_prob = False, this model has True"):
        exported(source, "4bit")
    for kind, rope in (("mixtral", "linear"), ("llama", "dynamic")):
        stretch = {"rope_type": rope, "rope_theta": THETA, "factor": 4.0}
        source = save(tiny_model(kind, rope_parameters=stretch, rope_theta=None), tmp_path / rope)
        with pytest.raises(DataError, match=f"rope_type = {rope}"):
            exported(source, "4bit")
    source = save(tiny_model("mixtral", sliding_window=16), tmp_path / "window")
    with pytest.raises(DataError, match="window of 16"):
        exported(source, "4bit")
    source = save(tiny_model("olmoe"), tmp_path / "olmoe")
    for wrong, told in (
        ({"quantization": "q4"}, "choose one of f32, f16, bf16"),
        ({"quantization": "4bit", "group_size": 48}, "choose 32, 64 or 128"),
        ({"quantization": "4bit", "bits_by_module": {"lm_head": 7}}, "7 bits for 'lm_head'"),
        ({"quantization": "4bit", "bits_by_module": {"model.layers.0.mlp.experts.3.up_proj": 8}}, "no matrix"),
        ({"quantization": "bf16", "bits_by_module": {"lm_head": 8}}, "no effect"),
    ):
        with pytest.raises(ConfigError, match=told):
            exported(source, wrong.pop("quantization"), **wrong)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ConfigError, match="group_size 64 does not divide expert_size 96"):
        exported(source, "4bit", group_size=64)
    assert not (tmp_path / "4bit").exists()


def test_a_source_that_lacks_a_tensor_leaves_nothing_behind(tmp_path: Path) -> None:
    source = save(tiny_model("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ArtifactError, match="mlx-lm could not make '4bit'"):
        export(source, tmp_path / "out", "4bit", tmp_path / ".scratch")
    assert not (tmp_path / "out").exists()
