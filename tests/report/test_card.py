"""The model card: what the Hub reads is valid and true, and carbon is there only where it is known."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

from hpc.report.card import card_of, write_card
from hpc.report.gather import gather
from launch import main
from tests.report.synthetic import FACILITY, SyntheticRun, quality, whole_run


def complete(root: Path, **more: object) -> SyntheticRun:
    """A run whose nodes all reported."""
    run = SyntheticRun(root, **more)
    run.simple("text", {"unigram_loss": 6.2})
    run.simple("pretrain", {"heldout_loss": 3.15, "total_params": 63_000_000, "active_params": 14_000_000})
    run.simple("lora", {"heldout_loss_before": 3.4, "heldout_loss": 3.2})
    run.simple("merge", {"max_abs_logit_difference": 1e-6})
    run.simple("quantize", {"bits": 4, "expert_bits_per_weight": 4.13, "kl": 0.001, "top1_agreement": 0.98})
    run.simple("evaluate", {"models": {"quantize": quality(22.4)}})
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete(tmp_path_factory.mktemp("runs") / "synthetic").root


def test_the_hub_reads_tags_library_evaluation_and_emissions(root: Path) -> None:
    data = ModelCard(write_card(root, "quantize")).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", None)
    assert {"moe", "mixture-of-experts", "olmoe", "compressed-tensors", "4-bit"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("perplexity", 22.4, "text")
    emissions = data.to_dict()["co2_eq_emissions"]
    run = gather(root)
    kwh = (run.lineage_j(run.stage("quantize")) or 0) / 3.6e6
    assert emissions["emissions"] == pytest.approx(kwh * 1.15 * 1.1 * 41.5, rel=1e-3)
    assert emissions["training_type"] == "pre-training and fine-tuning"
    assert emissions["geographical_location"] == "Edinburgh, UK"
    assert emissions["hardware_used"].startswith("A made-up cluster, 4 x GPU X a node")
    assert "carbon intensity 41.5 g/kWh (grid operator, 2024)" in emissions["source"]
    assert "measured joules of all attempts" in emissions["source"]


def test_without_a_carbon_intensity_there_are_no_emissions(tmp_path: Path) -> None:
    run = complete(tmp_path / "plain", facility={"pue": 1.1, "source": "a test"})
    card = write_card(run.root, "merge")
    assert "co2_eq_emissions" not in ModelCard(card).data.to_dict()
    assert "No `co2_eq_emissions` in the front matter: the site states no carbon intensity." in card


def test_without_a_pue_emissions_are_those_of_the_nodes_alone_and_say_so(tmp_path: Path) -> None:
    run = complete(tmp_path / "nodes", facility={"carbon_g_per_kwh": FACILITY["carbon_g_per_kwh"]})
    emissions = ModelCard(write_card(run.root, "pretrain")).data.to_dict()["co2_eq_emissions"]
    facts = gather(run.root)
    kwh = (facts.lineage_j(facts.stage("pretrain")) or 0) / 3.6e6
    assert emissions["emissions"] == pytest.approx(kwh * 41.5, rel=1e-3)
    assert "(nodes alone)" in emissions["source"]
    assert emissions["training_type"] == "pre-training"
    assert "geographical_location" not in emissions


def test_a_node_that_reported_nothing_keeps_emissions_out_and_is_named(tmp_path: Path) -> None:
    card = write_card(whole_run(tmp_path / "synthetic").root, "quantize")
    assert "co2_eq_emissions" not in ModelCard(card).data.to_dict()
    assert "* pretrain: attempt 2: node n4 reported nothing" in card
    assert "at least " in card


def test_an_adapter_names_its_library_and_its_base(root: Path) -> None:
    card = write_card(root, "lora")
    assert ModelCard(card).data.library_name == "peft"
    assert "# pretrain of the same run, digest below" in card
    assert f"`{gather(root).stage('pretrain').digest}`" in card


def test_a_checkpoint_makes_no_claim_that_belongs_to_the_finished_stage(root: Path) -> None:
    run = gather(root)
    card = card_of(run, run.stage("pretrain"), step=120)
    assert "This is a checkpoint after step 120 of 300." in card
    assert "model-index" not in card
    assert "3.15" not in card
    assert "co2_eq_emissions" not in ModelCard(card).data.to_dict()


def test_text_from_elsewhere_cannot_break_the_table_it_is_in(tmp_path: Path) -> None:
    evil = {"pue": 1.1, "source": "a | b <img src=x> `c`\nd", "year": 2025}
    card = write_card(complete(tmp_path / "evil", facility=evil).root, "merge")
    (line,) = [line for line in card.splitlines() if line.startswith("| all of it")]
    assert line.endswith("| a \\| b &lt;img src=x> 'c' d, 2025 |")


def test_the_verb_prints_or_writes_a_card_and_refuses_what_has_none(root: Path, tmp_path: Path) -> None:
    printed = CliRunner().invoke(main, ["card", str(root), "merge"])
    assert printed.output == write_card(root, "merge")
    out = tmp_path / "README.md"
    assert CliRunner().invoke(main, ["card", str(root), "merge", "--out", str(out)]).output == f"card: {out}\n"
    assert out.read_text() == printed.output
    for stage, told in (("text", "a prepare stage leaves tokens"), ("merg", "did you mean 'merge'?")):
        refused = CliRunner().invoke(main, ["card", str(root), stage])
        assert refused.exit_code == 2
        assert told in refused.output


def test_export_copies_the_verified_artifact_of_a_finished_stage_with_its_card(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep/model"
    result = CliRunner().invoke(main, ["export", str(root), "quantize", str(out)])
    assert result.output == f"{out}: quantize, as the stage left it\n"
    artifact = root / "stages/quantize/artifact"
    assert {path.name for path in out.iterdir()} == {path.name for path in artifact.iterdir()} | {"README.md"}
    assert (out / "model.safetensors").read_bytes() == (artifact / "model.safetensors").read_bytes()
    assert (out / "README.md").read_text() == write_card(root, "quantize")
    assert not (artifact / "README.md").exists(), "what has a receipt is left alone"
    refused = CliRunner().invoke(main, ["export", str(root), "merge", str(tmp_path / "b"), "--step", "5"])
    assert (refused.exit_code, "its artifact is all there is of it" in refused.output) == (2, True)


def test_export_refuses_an_artifact_that_was_damaged(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "synthetic"
    shutil.copytree(root, copy)
    (copy / "stages/merge/artifact/model.safetensors").write_bytes(b"v" * 1000)
    result = CliRunner().invoke(main, ["export", str(copy), "merge", str(tmp_path / "out")])
    assert result.exit_code == 4
    assert "is damaged" in result.output
    assert not (tmp_path / "out").exists()
