"""Damage between the library that writes an artifact and the proof: refused by the name of what is wrong."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from gguf import GGUFReader

from hpc.config import Export
from hpc.data.tokenizer import copy_tokenizer, train_tokenizer
from hpc.errors import ArtifactError
from hpc.runtimes.remote import Remote
from hpc.shrink import mlx_export
from hpc.shrink.formats import LaptopFormat, laptop_format
from hpc.shrink.gguf_convert import convert
from hpc.shrink.gguf_quantize import quantize
from hpc.shrink.mlx_convert import Conversion
from hpc.shrink.mlx_convert import convert as convert_to_mlx
from hpc.stages.export import Proof, prove
from tests.shrink import wide
from tests.shrink.conftest import Converted

FORMATS = ("gguf-q4_k_m", "mlx-4bit")
EXPERT = 2


@dataclass(frozen=True)
class Made:
    """A model in a format, quantized and not."""

    made: LaptopFormat
    stage: Export
    original: Remote
    plain: Path
    path: Path

    def prove(self) -> Proof:
        """As the stage does it."""
        sequences = [wide.some_ids()[:64]]
        return prove(self.made, self.stage, self.original, self.plain, self.path, sequences, lambda _: None)


@pytest.fixture(scope="module")
def original(converted: Converted) -> Iterator[Remote]:
    """The source in its process, one for all tests."""
    with Remote(converted("mixtral")[1], 160) as opened:
        yield opened


def write(kind: str, source: Path, folder: Path) -> tuple[Path, Path]:
    """The unquantized and the quantized artifact, by the same code as ever, in this process to save their start."""
    if kind.startswith("gguf"):
        plain, path = folder / "plain.gguf", folder / "model.gguf"
        convert(source, plain, "f32")
        quantize(plain, path, kind.removeprefix("gguf-"), 2, {}, {})
        return plain, path
    with pytest.MonkeyPatch.context() as patch:

        def here(wanted: Conversion, _: str) -> None:
            convert_to_mlx(Conversion(**json.loads(wanted.text())))

        patch.setattr(mlx_export, "_in_fresh_process", here)
        for name in ("f32", kind.removeprefix("mlx-")):
            mlx_export.export(source, folder / name, name, folder / "scratch")
    return folder / "f32", folder / kind.removeprefix("mlx-")


@pytest.fixture
def made(request: pytest.FixtureRequest, converted: Converted, original: Remote, tmp_path: Path) -> Made:
    """The Mixtral in the format that a test asks for."""
    kind = request.param
    wanted = {"kind": "export", "name": "laptop", "needs": ["model"], "format": kind, "accepted_kl": 0.5}
    plain, path = write(kind, converted("mixtral")[1], tmp_path)
    return Made(laptop_format(kind, 64), Export.model_validate(wanted), original, plain, path)


def in_gguf(path: Path, damage: Callable[[Any, Any], None]) -> None:
    reader = GGUFReader(str(path), "r+")
    damage(*(next(t.data for t in reader.tensors if t.name == f"blk.1.ffn_{part}_exps.weight") for part in PARTS))
    reader.data.flush()


def in_mlx(path: Path, damage: Callable[[Any, Any, Any], None]) -> None:
    tensors: Any = mx.load(str(path / "model.safetensors"))
    for kind in ("weight", "scales", "biases"):
        matrices = "model.layers.1.block_sparse_moe.switch_mlp"
        damage(*(tensors[f"{matrices}.{part}_proj.{kind}"] for part in PARTS), kind)
    mx.eval(tensors)
    mx.save_safetensors(str(path / "model.safetensors"), tensors, metadata={"format": "mlx"})


PARTS = ("gate", "up")


def lose_scales(made: Made) -> None:
    """Those of one matrix of one expert."""

    def of_blocks(_: Any, up: Any) -> None:
        up[EXPERT].reshape(-1, 144)[:, :4] = 0  # a block of Q4_K begins with its two scales, in fp16

    def of_groups(_: Any, up: Any, kind: str) -> None:
        if kind != "weight":
            up[EXPERT] = mx.zeros_like(up[EXPERT])

    in_gguf(made.path, of_blocks) if made.path.is_file() else in_mlx(made.path, of_groups)


def swap_gate_and_up(made: Made) -> None:
    """Of one expert."""

    def swap(gate: Any, up: Any, _: str = "") -> None:
        kept = gate[EXPERT] + 0  # a copy
        gate[EXPERT] = up[EXPERT]
        up[EXPERT] = kept

    in_gguf(made.path, swap) if made.path.is_file() else in_mlx(made.path, swap)


@pytest.mark.parametrize("made", FORMATS, indirect=True)
def test_a_sound_artifact_passes_and_one_damaged_expert_is_refused_by_name(made: Made) -> None:
    if made.path.is_file():  # MLX's is slow to start; tests/runtimes/test_mlx.py has it
        proof = made.prove()
        assert 0 < proof.agreement.kl < 0.5
        assert 0.01 < proof.errors.worst < 0.2
    whole = made.path.with_name("whole")
    (shutil.copyfile if made.path.is_file() else shutil.copytree)(made.path, whole)
    for damage, part, size in ((lose_scales, "up", "1.00"), (swap_gate_and_up, "gate", r"1\.[34]\d")):
        damage(made)
        names = rf"(blk\.1\.ffn_{part}_exps|model\.layers\.1\.mlp\.experts)\.{EXPERT}\..*"
        with pytest.raises(ArtifactError, match=rf"^the artifact read back has another {names}: {size} of its size"):
            made.prove()
        made.path.unlink() if made.path.is_file() else shutil.rmtree(made.path)
        (shutil.copyfile if whole.is_file() else shutil.copytree)(whole, made.path)


@pytest.mark.parametrize("made", FORMATS, indirect=True)
def test_the_tokenizer_of_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    train_tokenizer(["def other(words):\n    return [word for word in words]\n" * 50], wide.VOCAB, tmp_path / "other")
    if made.path.is_dir():
        copy_tokenizer(tmp_path / "other", made.path)
    else:
        stranger = shutil.copytree(made.original.path, tmp_path / "stranger")
        copy_tokenizer(tmp_path / "other", stranger)
        made = replace(made, path=write("gguf-q4_k_m", stranger, tmp_path)[1])
    with pytest.raises(ArtifactError, match=r"^the artifact cuts text into other tokens than the model's tokenizer"):
        made.prove()
