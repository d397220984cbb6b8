"""The README's commands do what it says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.bench.plan import score
from tests.conftest import ROOT, Launch

MAIN = "pip install -e '.[cpu]' && python launch.py run configs/quickstart.yaml"
TESTS = "pip install -e '.[cpu,test]' && pytest"


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_two_commands_are_the_first_ones_and_ci_runs_the_second() -> None:
    assert commands()[:2] == [MAIN, TESTS]
    script = (ROOT / ".ci/run").read_text()
    assert "pip install -q -e '.[cpu,test,dev]'" in script
    assert script.rstrip().splitlines()[-1].startswith("pytest")


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python launch.py")])
def test_every_other_command_works_as_written(command: str, launch: Launch) -> None:
    result = launch(*shlex.split(command)[2:])
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_readme_is_short_and_has_its_figures() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 260
    assert "FIGURES" not in text


def test_the_plans_accuracy_is_what_bench_plan_says() -> None:
    found = score(None)
    kinds = found["by_kind"]
    figures = (
        found["median_error"], kinds["dense"]["median_error"], kinds["MoE"]["median_error"],
        found["leave_one_source_out"],
    )  # fmt: skip
    every, dense, sparse, unseen = (f"{100 * figure:.1f} %" for figure in figures)
    text = (ROOT / "README.md").read_text().replace("\n", " ")
    assert f"median error {every}, dense {dense}, MoE {sparse}, sources not seen in the fit {unseen}" in text
    assert f"against {len(found['rows'])} published runs" in text


def test_every_folder_has_its_place_in_the_map() -> None:
    text = (ROOT / "README.md").read_text()
    for path in [*(ROOT / "hpc").iterdir(), *(ROOT / "slurm").iterdir()]:
        if path.is_dir() and path.name != "__pycache__":
            assert f"`{path.relative_to(ROOT)}/`" in text


@pytest.mark.slow
def test_the_main_command_works_word_for_word_in_an_empty_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    script = f". {tmp_path / 'venv/bin/activate'} && {MAIN}"
    result = subprocess.run(["bash", "-c", script], cwd=clone, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (clone / "runs/quickstart/report.html").exists()
    assert not (clone / "runs/quickstart/stages/pretrain/checkpoints").exists()
