"""What a cluster's daemons read: slurm.conf, gres.conf, hosts, start scripts of nodes, wrappers of the commands.

Every setting that deviates from Slurm's default says why; most were found the hard way.
"""

import os
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Mode = Literal["netns", "multi"]

CHARACTER_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx")
"""Slurm wants one existing character device per GPU; these exist everywhere."""

COMMANDS = ("sbatch", "srun", "salloc", "squeue", "scancel", "scontrol", "sinfo", "sacct", "sacctmgr", "sprio")


@dataclass(frozen=True)
class Layout:
    """A cluster as asked for, and where its files are."""

    root: str
    mode: Mode = "netns"
    """netns: every node has its own network, host name and processes (root only). multi: all share the machine's."""
    nodes: int = 4
    cpus: int = 4
    """CPUs that each node claims to have, whatever the machine has."""
    memory_mb: int = 8000
    gpus: int = 0
    """Pretended GPUs of a node."""
    subnet: str = "10.77.0"
    port: int = 16817
    accounting: bool = False
    """Whether slurmdbd and MariaDB run, so that `sacct` answers."""
    power_w: tuple[float, ...] = ()
    """Watts that each node draws, fed into pm_counters of its own (netns only); empty: nodes have no meter."""
    slurmd_timeout_s: int = 10
    kill_wait_s: int = 15
    min_job_age_s: int = 300
    """How long the controller remembers a job that has ended."""

    @property
    def path(self) -> Path:
        """Folder of everything."""
        return Path(self.root)

    @property
    def conf(self) -> Path:
        """slurm.conf, as SLURM_CONF names it."""
        return self.path / "etc" / "slurm.conf"

    @property
    def controller(self) -> str:
        """Address of slurmctld."""
        return f"{self.subnet}.1" if self.mode == "netns" else "127.0.0.1"

    @property
    def controller_host(self) -> str:
        """Host name of slurmctld."""
        return "ctl" if self.mode == "netns" else os.uname().nodename.split(".")[0]

    @property
    def names(self) -> list[str]:
        """Nodes."""
        return [f"n{number + 1}" for number in range(self.nodes)]

    def address(self, node: str) -> str:
        """Address of a node."""
        number = int(node[1:])
        return f"{self.subnet}.{10 + number}" if self.mode == "netns" else f"127.0.0.{10 + number}"

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def write_files(layout: Layout) -> None:
    """Write all files of a cluster."""
    for name in ("etc", "munge", "run", "log", "spool", "state", "bin"):
        (layout.path / name).mkdir(parents=True, exist_ok=True)
    key = layout.path / "munge" / "munge.key"
    if not key.exists():
        key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    (layout.path / "munge").chmod(0o755)
    layout.conf.write_text(slurm_conf(layout))
    gres = "".join(f"Name=gpu File=/dev/{device}\n" for device in CHARACTER_DEVICES[: layout.gpus])
    (layout.path / "etc" / "gres.conf").write_text(gres)
    (layout.path / "etc" / "hosts").write_text(_hosts(layout))
    (layout.path / "etc" / "nsswitch.conf").write_text(_nsswitch())
    _script(layout.path / "ctl-init.sh", CONTROLLER_INIT)
    _script(layout.path / "node-init.sh", NODE_INIT)
    if layout.accounting:
        _write_private(layout.path / "etc" / "slurmdbd.conf", slurmdbd_conf(layout))
        (layout.path / "etc" / "init.sql").write_text(INIT_SQL)


def write_wrappers(layout: Layout, controller_pid: int | None) -> None:
    """Commands that reach the controller from outside its network; on a node they are the plain commands."""
    for name in COMMANDS:
        real = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin")
        if real is None:
            continue
        enter = f"nsenter --net=/proc/{controller_pid}/ns/net -- " if controller_pid else ""
        _script(
            layout.path / "bin" / name,
            f'#!/bin/sh\nexport SLURM_CONF={layout.conf}\n[ -n "$SLURMD_NODENAME" ] && exec {real} "$@"\n'
            f'exec {enter}{real} "$@"\n',
        )


def slurm_conf(layout: Layout) -> str:
    """The text of slurm.conf."""
    root, user = layout.path, _user()
    socket = f"{root}/munge/munge.socket.2"
    lines = [
        "ClusterName=greenmoe",
        f"SlurmctldHost={layout.controller_host}({layout.controller})",
        f"SlurmctldPort={layout.port}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        f"StateSaveLocation={root}/state",
        f"SlurmdSpoolDir={root}/spool/%n",
        f"SlurmctldPidFile={root}/run/slurmctld.pid",
        f"SlurmdPidFile={root}/run/slurmd-%n.pid",
        f"SlurmctldLogFile={root}/log/slurmctld.log",
        f"SlurmdLogFile={root}/log/slurmd-%n.log",
        "SlurmctldDebug=info",
        "SlurmdDebug=info",
        # Neither cgroups nor systemd nor affinity: works in any container.
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "SlurmdParameters=config_overrides",  # nodes claim more CPUs than the machine has
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerCPU=500",  # without it a job takes the memory of a whole node
        "SchedulerType=sched/backfill",
        "SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1,bf_resolution=60",
        "PriorityType=priority/basic",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SlurmctldParameters=preempt_send_user_signal",
        "JobRequeue=1",
        "EnforcePartLimits=ALL",  # an impossible request is refused, not queued for ever
        "ReturnToService=2",
        f"KillWait={layout.kill_wait_s}",
        f"SlurmdTimeout={layout.slurmd_timeout_s}",
        "SlurmctldTimeout=30",
        "MessageTimeout=10",
        "InactiveLimit=0",
        f"MinJobAge={layout.min_job_age_s}",
        "CompleteWait=0",
        "JobAcctGatherType=jobacct_gather/linux",
        f"JobAcctGatherFrequency=task=5{',energy=1' if layout.power_w else ''}",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        f"AuthInfo=socket={socket},cred_expire=5",  # a requeued job is held back this long; the default is 120 s
    ]
    if layout.gpus:
        lines.append("GresTypes=gpu")
    if layout.power_w:
        lines += [
            "AcctGatherEnergyType=acct_gather_energy/pm_counters",
            "AcctGatherNodeFreq=30",  # with 1 the controller never gets to ping nodes, and a dead one stays up
        ]
    if layout.accounting:
        lines += [
            "AccountingStorageType=accounting_storage/slurmdbd",
            f"AccountingStorageHost={layout.controller}",
            f"AccountingStoragePort={layout.port + 2}",
            f"AccountingStoragePass={socket}",  # the connection to slurmdbd takes the socket from here, not AuthInfo
        ]
    else:
        lines.append("AccountingStorageType=accounting_storage/none")
    for index, name in enumerate(layout.names):
        where = f"NodeAddr={layout.address(name)} Port={layout.port + 1}"
        if layout.mode == "multi":
            host, port = layout.controller_host, layout.port + 101 + index
            where = f"NodeHostname={host} NodeAddr={layout.address(name)} Port={port}"
        gpus = f"Gres=gpu:{layout.gpus} " if layout.gpus else ""
        lines.append(f"NodeName={name} {where} CPUs={layout.cpus} RealMemory={layout.memory_mb} {gpus}State=UNKNOWN")
    common = "Nodes=ALL State=UP"
    lines += [
        f"PartitionName=main {common} Default=YES MaxTime=1-00:00:00 PriorityTier=1",
        f"PartitionName=low {common} MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=REQUEUE",
        f"PartitionName=lowgrace {common} MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=15",
        f"PartitionName=high {common} MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def slurmdbd_conf(layout: Layout) -> str:
    """The text of slurmdbd.conf; it holds a password."""
    return "\n".join(
        [
            f"DbdHost={layout.controller_host}",
            f"DbdAddr={layout.controller}",
            f"DbdPort={layout.port + 2}",
            f"SlurmUser={_user()}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={layout.path}/munge/munge.socket.2",
            f"LogFile={layout.path}/log/slurmdbd.log",
            f"PidFile={layout.path}/run/slurmdbd.pid",
            "StorageType=accounting_storage/mysql",
            "StorageHost=127.0.0.1",
            f"StoragePort={layout.port + 3}",
            "StorageUser=slurm",
            "StoragePass=slurm",
            "StorageLoc=slurm_acct",
            "CommitDelay=1",
            "",
        ]
    )


def _hosts(layout: Layout) -> str:
    lines = ["127.0.0.1 localhost"]
    if layout.mode == "netns":
        lines += [f"{layout.controller} {layout.controller_host}"]
        lines += [f"{layout.address(name)} {name}" for name in layout.names]
    return "\n".join(lines) + "\n"


def _nsswitch() -> str:
    """Without DNS inside the nodes every look-up of a name would wait for a time-out."""
    path = Path("/etc/nsswitch.conf")
    lines = [line for line in (path.read_text().splitlines() if path.exists() else []) if not line.startswith("hosts:")]
    return "\n".join([*lines, "hosts: files", ""])


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _write_private(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


INIT_SQL = """\
CREATE DATABASE IF NOT EXISTS slurm_acct;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct.* TO 'slurm'@'127.0.0.1';
FLUSH PRIVILEGES;
"""

CONTROLLER_INIT = """\
#!/bin/bash
# Keeps the controller's network, host name and mounts alive: ROOT ADDRESS
set -e
hostname ctl
mount --bind "$1/etc/hosts" /etc/hosts
mount --bind "$1/etc/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
ip link add br0 type bridge
ip addr add "$2/24" dev br0
ip link set br0 up
touch "$1/run/ctl.ready"
exec sleep infinity
"""

NODE_INIT = """\
#!/bin/bash
# Process 1 of a node: ROOT NAME ADDRESS. Killing it is a power failure: the kernel ends everything in the node.
hostname "$2"
mount --bind "$1/etc/hosts" /etc/hosts
mount --bind "$1/etc/nsswitch.conf" /etc/nsswitch.conf
if [ -d "$1/power/$2" ]; then # /sys again, in memory, with the one directory that a sysfs does not let us make
  mkdir -p "$1/run/sys-$2"
  mount --rbind /sys "$1/run/sys-$2"
  mount -t tmpfs tmpfs /sys
  for entry in "$1/run/sys-$2"/*; do mkdir "/sys/${entry##*/}" && mount --rbind "$entry" "/sys/${entry##*/}"; done
  umount -l "$1/run/sys-$2"
  mkdir -p /sys/cray/pm_counters && mount --bind "$1/power/$2" /sys/cray/pm_counters
fi
ip link set lo up
while ! ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add "$3/24" dev eth0
ip link set eth0 up
export SLURM_CONF=$1/etc/slurm.conf
slurmd -D &
while :; do wait -n; [ $? = 127 ] && sleep 1; done # adopt and reap what slurmd leaves behind
"""
