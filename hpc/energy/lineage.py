"""Energy that a run did not draw itself but stands on: the artifacts of other runs that it started from.

An adapter on a base model of another run would not be there without the base, nor the base without its text. Their
energy is *embodied* in what this run makes. It is stated beside the run's own energy, never added into it, and each
artifact counts once however many stages use it: artifacts are told apart by their digest, and one that a stage of this
run has made itself (the same text prepared again) is not inherited.

Every run that starts from a base states the full amount, with the number of runs that are known to share it. Dividing
by that number would let a figure shrink whenever somebody else starts a run; it is done (`share`) only if told.
"""

from dataclasses import dataclass
from pathlib import Path

from hpc.energy.curves import read_samples, total_j
from hpc.errors import ArtifactError
from hpc.run.directory import StageDirectory
from hpc.run.origin import Ancestor, note_user, read_origins, write_origins
from hpc.run.receipt import read_receipt


@dataclass(frozen=True)
class Inherited:
    """Energy of another run's artifact that this run started from, counted once."""

    run: str
    stage: str
    digest: str
    energy_j: float | None
    """All of it, whatever the share."""
    share: float
    reason: str


def record_origin(directory: StageDirectory, base_root: Path, run: str, share: float | None = None) -> list[Ancestor]:
    """Note that the stage in `directory` (of run `run`) starts from the artifact of the stage folder `base_root`.

    `share`: the part of its energy that this run states; None: all of it. Raises ArtifactError when the base has no
    receipt, StorageError.
    """
    users = note_user(StageDirectory(base_root), run)
    found = [
        Ancestor(one.run, one.stage, one.digest, one.energy_j, users, 1.0 if share is None else share)
        for one in ancestry(base_root)
    ]
    known = {one.digest for one in found}
    write_origins(directory, [*(one for one in read_origins(directory) if one.digest not in known), *found])
    return found


def ancestry(stage_root: Path) -> list[Ancestor]:
    """A finished stage and everything it was made from, nearest first, each artifact once. Raises ArtifactError."""
    found: dict[str, Ancestor] = {}

    def visit(root: Path) -> None:
        receipt = read_receipt(StageDirectory(root))
        if receipt is None:
            raise ArtifactError(f"{root} has no receipt beside its artifact: name the folder of a stage that is done")
        if receipt.digest in found:
            return
        energy = total_j(read_samples(root))
        found[receipt.digest] = Ancestor(str(root.parent.parent), receipt.stage, receipt.digest, energy)
        for need in receipt.inputs:
            visit(root.parent / need)
        for one in read_origins(StageDirectory(root)):
            found.setdefault(one.digest, one)

    visit(stage_root)
    return list(found.values())


def inherited(run_root: Path) -> tuple[Inherited, ...]:
    """What the stages of a run started from in other runs, each artifact once."""
    own: set[str] = set()
    found: dict[str, Ancestor] = {}
    for root in sorted((run_root / "stages").glob("*")):
        directory = StageDirectory(root)
        receipt = read_receipt(directory)
        own |= {receipt.digest} if receipt else set()
        for one in read_origins(directory):
            found.setdefault(one.digest, one)
    return tuple(_stated(one) for digest, one in found.items() if digest not in own)


def _stated(one: Ancestor) -> Inherited:
    shared = f", shared by {one.users} known runs" if one.users > 1 else ""
    part = "all of it" if one.share == 1 else f"{one.share:.0%} of it"
    return Inherited(one.run, one.stage, one.digest, one.energy_j, one.share, f"embodied{shared}: {part} stated here")
