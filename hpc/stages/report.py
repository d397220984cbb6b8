"""What the run was, for people. artifact/: report.html (copied to RUN), and cards/STAGE/README.md of every model.

The page and the cards are written from the run directory alone: `launch.py report RUN` and `launch.py card RUN STAGE`
write them again at any time.
"""

import shutil
from pathlib import Path

from hpc.report.card import card_of, has_card
from hpc.report.gather import gather
from hpc.report.page import write_report
from hpc.run.directory import write_atomic
from hpc.run.task import Context, Result


def run(context: Context) -> Result:
    """Do the stage."""
    context.progress("writing the page")
    artifact = context.directory.artifact
    artifact.mkdir(parents=True)
    facts = gather(Path(context.task.run_directory))
    page = artifact / "report.html"
    write_report(facts, page)
    shutil.copyfile(page, Path(context.task.run_directory) / "report.html")
    told = [stage for stage in facts.chain if has_card(stage)]
    for stage in told:
        folder = artifact / "cards" / stage.name
        folder.mkdir(parents=True)
        write_atomic(folder / "README.md", card_of(facts, stage))
    return Result(
        {"stages": sum(stage.state == "done" for stage in facts.chain), "page_bytes": page.stat().st_size,
         "cards": len(told)},
        {"stages": "measured: stages with a receipt", "page_bytes": "measured: size of report.html",
         "cards": "measured: models with a card"},
        {},
        ("jinja2", "plotly"),
    )  # fmt: skip
