"""The shipped sites: every fact has a source, and the text that sbatch is given for each is the one we know.

After a wanted change: `python -m tests.slurm.test_sites` writes the texts anew; read the diff before you commit it.
"""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpc.config.load import load_config
from hpc.errors import ConfigError
from hpc.plan.plan import plan as make_plan
from slurm.batch import dry_run
from slurm.site import SITES, load_site
from tests.conftest import ROOT

GOLDEN = ROOT / "tests/slurm/golden"
NAMES = sorted(path.stem for path in SITES.glob("*.yaml"))
CLUSTERS = [name for name in NAMES if name != "local"]
TOLD_ELSEWHERE = {"name", "description", "sources", "facility"}
"""Keys that are no facts, or carry their source in themselves."""

CHAIN = """\
name: golden
tracking: {{wandb: disabled}}
stages:
  - name: text
    kind: prepare
    sources: [{{module: "pydoc_data.topics:topics"}}]
    tokenizer: {{vocab_size: 512}}
  - name: pretrain
    kind: pretrain
    needs: [text]
    resources: {{time_limit_min: 240}}
    train:
      model: {{hidden_size: 64, num_layers: 2, num_attention_heads: 2, expert_size: 64}}
      router: {{num_experts: {experts}}}
      batches: {{seq_len: 64, micro_batch_size: 1, tokens_per_step: {tokens}}}
      steps: 30
      optimizer: {{lr: 3e-4}}
      parallel: {{nodes: 2, ranks_per_node: {ranks}, expert_parallel_size: {experts}}}
  - name: lora
    kind: lora
    matrix: {{task: [a, b]}}
    needs: [pretrain, text]
    train:
      rank: 4
      alpha: 8
      batches: {{seq_len: 64, micro_batch_size: 1, tokens_per_step: {tokens}}}
      steps: 5
      optimizer: {{lr: 3e-4}}
      parallel: {{ranks_per_node: {ranks}}}
  - {{name: merge, kind: merge, matrix: {{task: [a, b]}}, needs: [pretrain, "lora-{{task}}"]}}
"""


def text_for(name: str, folder: Path) -> str:
    """The sbatch text of a small chain with two full nodes, at paths that are the same everywhere."""
    overrides = ["slurm.account=ab12", "python=/project/ab12/venv/bin/python"]
    site = load_site(name, overrides)
    ranks = site.machine.ranks_per_node
    config = folder / "golden.yaml"
    config.write_text(CHAIN.format(ranks=ranks, experts=2 * ranks, tokens=64 * 2 * ranks))
    loaded = load_config(config, ["run_root=/project/ab12/runs"])
    return dry_run(loaded, site, make_plan(loaded, site.machine)) + "\n"


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_text_that_sbatch_is_given(name: str, tmp_path: Path) -> None:
    text = text_for(name, tmp_path)
    assert text == (GOLDEN / f"{name}.sbatch").read_text(), "see the top of this file"
    for script in text.split("##### ")[1:]:
        subprocess.run(["bash", "-n"], input=script.partition("\n")[2], text=True, check=True)


def leaves(value: Any, prefix: str = "") -> list[str]:
    """Dotted keys of everything that a profile states."""
    if isinstance(value, dict):
        return [key for name, inner in value.items() for key in leaves(inner, f"{prefix}.{name}".strip("."))]
    return [] if value in (None, [], {}) else [prefix]


@pytest.mark.parametrize("name", [name for name in CLUSTERS if name not in ("devcluster", "generic")])
def test_every_fact_of_a_profile_has_a_source_with_a_date(name: str) -> None:
    site = load_site(name)
    for key in leaves(site.model_dump(exclude_unset=True)):
        if key.split(".")[0] in TOLD_ELSEWHERE:
            continue
        parts = key.split(".")
        source = next((site.sources[".".join(parts[:n])] for n in range(len(parts), 0, -1)
                       if ".".join(parts[:n]) in site.sources), None)  # fmt: skip
        assert source, f"{name}: {key} has no source"
        assert any(word in source for word in ("202", "assumed", "machine.source")), f"{name}: {key}: {source}"
    assert site.slurm is not None
    assert site.slurm.account is None, "whose budget it is, only the user knows"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("slurm.partition=\"gpu\\nrm -rf /\"", "slurm.partition"),
        ("slurm.account=\"a b\"", "slurm.account"),
        ("slurm.options={wrap: \"$(id)\"}", "slurm.options"),
        ("slurm.srun_options=[\"--x;id\"]", "slurm.srun_options"),
        ("modules=[\"gcc; id\"]", "modules[0]"),
        ("setup=[\"true\\nid\"]", "setup[0]"),
        ("environment={X: \"`id`\"}", "environment"),
        ("environment={\"X=1;id\": \"1\"}", "environment"),
        ("network_interface=\"eth0 id\"", "network_interface"),
        ("python=\"python\\nid\"", "python"),
        ("slurm.partitoin=gpu", "did you mean 'partition'?"),
    ],
)  # fmt: skip
def test_only_checked_characters_can_reach_a_job_script(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_site("devcluster", [override])
    assert expected in str(caught.value)


def test_an_unknown_site_is_told_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lumi-g'"):
        load_site("lumi_g")


if __name__ == "__main__":
    import tempfile

    for site_name in CLUSTERS:
        with tempfile.TemporaryDirectory() as scratch:
            (GOLDEN / f"{site_name}.sbatch").write_text(text_for(site_name, Path(scratch)))
