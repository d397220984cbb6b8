"""A cluster or a machine as data: what its scheduler wants, how fast it is, what it draws, what its facility states.

A shipped profile states facts only as far as public documentation does. `sources` says where each comes from; what is
unknown is null.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from hpc.config import Facility, Machine
from hpc.config.base import Frozen
from hpc.config.load import load_yaml_model
from hpc.config.near import nearest
from hpc.config.stages import WORD
from hpc.errors import ConfigError

SITES = Path(__file__).resolve().parent.parent / "configs" / "sites"

Word = Annotated[str, Field(pattern=WORD)]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@+,/-]{0,127}$")]
Line = Annotated[str, Field(pattern=r"^[\x20-\x7e]{1,400}$")]
"""One printable line of shell."""
Option = Annotated[str, Field(pattern=r"^--[a-z][a-z0-9-]*(=[A-Za-z0-9._:@+,/=-]+)?$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
VariableValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:@+=,/^~ -]*$")]


class Scheduler(Frozen):
    """What Slurm wants to know here."""

    partition: Word | None = None
    """Partition of the jobs; Slurm's default one when null."""

    qos: Word | None = None
    """Quality of service."""

    account: Word | None = None
    """Account (budget, project) that pays; give yours by `--site-set slurm.account=NAME`."""

    account_required: bool | None = None
    """Whether jobs without an account are refused; null: not known."""

    constraint: Word | None = None
    """Node feature that is asked for."""

    gpus_per_node: PositiveInt | None = None
    """GPUs of a node as Slurm counts them; null on a machine without any."""

    gpu_request: Literal["gpus-per-node", "gpus", "gres", "none"] = "gpus-per-node"
    """How jobs ask for GPUs: per node, as their sum (`gpus`), or not at all where the partition gives whole nodes."""

    tasks_in_step: bool = False
    """Whether ranks and their cores are asked of srun only, because sbatch refuses jobs that state them."""

    cpus_per_task: PositiveInt | None = None
    """Cores of one rank."""

    memory_per_node: str | None = Field(default=None, pattern=r"^[0-9]+[KMGT]?$")
    """Memory to ask for, as Slurm writes it; 0 is all of a node; null: the partition's default."""

    exclusive: bool = False
    """Whether a job wants its nodes for itself."""

    time_limit_min: PositiveInt = 60
    """Minutes of a job that asks for nothing else."""

    max_time_min: PositiveInt | None = None
    """The longest a job may run, minutes."""

    preemption: Literal["requeue", "cancel", "off"] | None = None
    """What happens to a preempted job."""

    signal_before_end_s: PositiveInt = 120
    """Seconds before the time limit at which Slurm signals the ranks, as the last call to save."""

    array_parallelism: PositiveInt = 64
    """Tasks of one array that run at the same time."""

    options: dict[Word, Word] = {}
    """Further sbatch options, name without dashes -> value."""

    srun_options: list[Option] = []
    """Further srun options, such as --cpu-bind=cores."""


class Hardware(Frozen):
    """What the facility says about its nodes; the plan's figures are those of `machine`."""

    nodes: PositiveInt | None = None
    """Nodes of this kind."""

    cores_per_node: PositiveInt | None = None
    """Physical cores."""

    memory_gib_per_node: PositiveFloat | None = None
    """Memory of the processors, GiB."""

    gpus_per_node: PositiveInt | None = None
    """Accelerators as the vendor counts them."""

    gpu: str | None = None
    """Accelerator."""

    network: str | None = None
    """Network between nodes."""


class Confirm(Frozen):
    """Above which cost `submit` asks first."""

    node_hours: PositiveFloat | None = None
    """Node-hours of all time limits together."""

    kwh: PositiveFloat | None = None
    """Planned energy of the IT, kWh."""


class Site(Frozen):
    """A place where stages run."""

    name: str = Field(pattern=WORD)
    """Short name, as `--site` takes it."""

    description: str
    """One line for people."""

    machine: Machine
    """One kind of node, as the plan sees it."""

    hardware: Hardware = Hardware()
    """One kind of node, as its facility describes it."""

    facility: Facility = Facility()
    """PUE, WUE and carbon, where the site states them."""

    slurm: Scheduler | None = None
    """Its scheduler; null on a machine without one."""

    modules: list[ModuleName] = []
    """Modules to load, in order."""

    setup: list[Line] = []
    """Shell lines that run before the ranks start; the job ends at the first one that fails."""

    python: Line | None = None
    """Command that starts Python on a compute node, such as `apptainer exec --rocm image.sif python`; by default the
    interpreter that submits, which must lie on a shared file system."""

    network_interface: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,15}$")
    """Interface of the fast network, for NCCL/RCCL and gloo; null: the first one with an address."""

    environment: dict[VariableName, VariableValue] = {}
    """Variables of every job, such as NCCL settings."""

    scratch: str | None = None
    """Where run directories belong."""

    quota: str | None = None
    """Quota there, in the site's words."""

    outgoing_network: bool | None = None
    """Whether compute nodes reach the internet (W&B online); null: not known."""

    power_counters: list[str] | None = None
    """Power counters that users can read on the nodes; null: not known."""

    confirm: Confirm = Confirm()
    """Above which cost `submit` asks first."""

    sources: dict[str, str] = {}
    """Key -> who states it and when: an address and a date, or `assumed` with the reason."""


def load_site(name: str, overrides: Sequence[str] = ()) -> Site:
    """The site of that name in configs/sites, or of a YAML file. Raises ConfigError."""
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        path = SITES / f"{name}.yaml"
        if not path.exists():
            raise ConfigError(
                f"--site {name!r} is not known{nearest(name, sorted(p.stem for p in SITES.glob('*.yaml')))}"
            )
    return load_yaml_model(path, Site, overrides)
