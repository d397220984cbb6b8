"""The life of a cluster: up, down, and the failures that a chain has to survive."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc.errors import SiteError
from slurm.devcluster.files import Layout, write_files, write_wrappers
from slurm.devcluster.power import folder
from slurm.devcluster.processes import (
    SYSTEM_PATH,
    is_alive,
    kill,
    require,
    run,
    start,
    tree,
    wait_until,
    with_environment,
)

PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
DATABASE_PACKAGES = "apt-get install --no-install-recommends slurmdbd slurm-wlm-mysql-plugin mariadb-server"
USABLE = {"idle", "mixed", "allocated", "completing"}


def default_root() -> Path:
    """Where the cluster of this user is. Short: a socket's path may have 107 characters."""
    return Path(f"/tmp/greenmoe-devcluster-{os.getuid()}")


@dataclass
class Cluster:
    """A running cluster. Its state is in ROOT/cluster.json, so every process can steer it."""

    layout: Layout
    pids: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each part took to come up."""

    # Life ------------------------------------------------------------------------------------------------------------

    @classmethod
    def up(cls, layout: Layout) -> "Cluster":
        """Start a cluster and wait until its nodes are idle. Raises SiteError."""
        require(("slurmctld", "slurmd", "munged", "sbatch"), PACKAGES)
        if layout.mode == "netns":
            require(("ip", "unshare", "nsenter"), PACKAGES)
            if os.getuid():
                raise SiteError("mode netns needs root: take --mode multi")
        if layout.power_w and layout.mode != "netns":
            raise SiteError("--power needs nodes with files of their own: take --mode netns, as root")
        if layout.power_w and len(layout.power_w) != layout.nodes:
            raise SiteError(f"--power states {len(layout.power_w)} nodes, --nodes {layout.nodes}: state one for each")
        if layout.accounting:
            require(("slurmdbd", "mariadbd", "mariadb-install-db"), DATABASE_PACKAGES)
        if (layout.path / "cluster.json").exists():
            cls.load(layout.path).down()
        cluster = cls(layout)
        try:
            cluster._up()
        except BaseException:
            cluster.down(keep=True)
            raise
        return cluster

    @classmethod
    def load(cls, root: Path) -> "Cluster":
        """The cluster below `root`. Raises SiteError when there is none."""
        try:
            state = json.loads((root / "cluster.json").read_text())
        except OSError:
            raise SiteError(f"no dev cluster is at {root}: start one with `python launch.py devcluster up`") from None
        return cls(Layout(**state["layout"]), state["pids"], state["seconds"])

    def down(self, keep: bool = False) -> None:
        """End everything; without `keep` its files go too."""
        for name in self.layout.names:
            with suppress(SiteError):
                self.kill_node(name)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged", "power", "ctl"):
            pid = self.pids.pop(name, None)
            if pid is not None:
                kill(tree(pid), signal.SIGKILL)
        if keep:
            self._save()
        else:
            shutil.rmtree(self.layout.path, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """What a shell needs to use the cluster."""
        path = f"{self.layout.path / 'bin'}:/usr/sbin:{os.environ.get('PATH', SYSTEM_PATH)}"
        return {"SLURM_CONF": str(self.layout.conf), "PATH": path}

    def _up(self) -> None:
        began = time.monotonic()
        write_files(self.layout)
        munge = self.layout.path / "munge"
        if self.layout.mode == "netns":
            with self._timed("network"):
                self._start_controller_namespace()
        with self._timed("munged"):
            self._daemon(
                "munged", "munged", "-F", "--force", "--num-threads=4", f"--key-file={munge}/munge.key",
                f"--socket={munge}/munge.socket.2", f"--pid-file={munge}/munged.pid",
                f"--log-file={munge}/munged.log", f"--seed-file={munge}/munged.seed", inside=False,
            )  # fmt: skip
            self._wait("munged", lambda: (munge / "munge.socket.2").exists(), 10)
        if self.layout.accounting:
            with self._timed("database"):
                self._start_database()
        write_wrappers(self.layout, self.pids.get("ctl"))
        with self._timed("slurmctld"):
            fresh = [] if (self.layout.path / "state" / "clustername").exists() else ["-i"]
            self._daemon("slurmctld", "slurmctld", "-D", *fresh)
            self._wait("slurmctld", lambda: self._command("scontrol", "ping").returncode == 0, 60)
        if self.layout.power_w:
            self._start_meters()
        with self._timed("nodes"):
            for name in self.layout.names:
                self._start_node(name)
            self.wait_nodes()
        self.seconds["total"] = round(time.monotonic() - began, 2)
        self._save()

    def _start_controller_namespace(self) -> None:
        root = self.layout.path
        (root / "run" / "ctl.ready").unlink(missing_ok=True)
        command: list[object] = ["unshare", "--net", "--uts", "--mount", "bash", root / "ctl-init.sh", root,
                                 self.layout.controller]  # fmt: skip
        self.pids["ctl"] = start(command, root / "log" / "ctl.out", {})
        self._wait("ctl", (root / "run" / "ctl.ready").exists, 10)

    def _start_meters(self) -> None:
        """One process feeds the meters of all nodes; it starts before them, so that slurmd finds its own."""
        root, watts = self.layout.path, zip(self.layout.names, self.layout.power_w, strict=True)
        code = Path(__file__).resolve().parent.parent.parent
        command = [
            sys.executable,
            "-m",
            "slurm.devcluster.power",
            root,
            *(f"{node}={power:g}" for node, power in watts),
        ]
        self.pids["power"] = start(command, root / "log" / "power.out", {"PYTHONPATH": str(code)})
        last = folder(root, self.layout.names[-1]) / "freshness"
        self._wait("power", lambda: last.exists() and last.stat().st_size > 0, 10)

    def _start_database(self) -> None:
        root, user = self.layout.path, os.environ.get("USER") or "root"
        data, port = root / "db", self.layout.port + 3
        run("mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={user}", "--skip-test-db",
            "--auth-root-authentication-method=normal", "--skip-name-resolve")  # fmt: skip
        self._daemon(
            "mariadbd", "mariadbd", "--no-defaults", f"--user={user}", f"--datadir={data}", f"--port={port}",
            "--bind-address=127.0.0.1", "--skip-name-resolve", f"--socket={root}/run/mysqld.sock",
            f"--pid-file={root}/run/mysqld.pid", f"--init-file={root}/etc/init.sql",
            "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0", "--innodb-buffer-pool-size=64M",
            "--innodb-log-file-size=32M", "--innodb-lock-wait-timeout=900", "--performance-schema=OFF",
            "--skip-log-bin",
        )  # fmt: skip
        self._wait("mariadbd", lambda: self._listens("127.0.0.1", port), 60)
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self._wait("slurmdbd", lambda: self._listens(self.layout.controller, self.layout.port + 2), 60)

    # Nodes and their failures ----------------------------------------------------------------------------------------

    def start_node(self, name: str) -> None:
        """Switch a node on again; one that is on is switched off first."""
        self.kill_node(name)
        self._start_node(name)
        self._save()

    def kill_node(self, name: str) -> None:
        """Power failure: slurmd, its steps and all ranks end at once; the node's network is gone."""
        self._check(name)
        pid = self.pids.pop(name, None)
        if pid is not None:
            if self.layout.mode == "netns":
                kill(reversed(tree(pid)))  # process 1 first: with it the kernel ends all others, none has a last word
            else:
                kill(with_environment("GREENMOE_DEVNODE", f"{self.layout.root}:{name}"))
        self._save()

    def kill_slurmd(self, name: str) -> None:
        """Only the node's daemon dies; steps and ranks go on (split brain)."""
        self._check(name)
        for process in tree(self.pids[name]):
            if process.name() == "slurmd":
                process.kill()

    def mark_down(self, name: str) -> None:
        """Tell slurmctld at once what it would notice after SlurmdTimeout."""
        self._check(name)
        self._command("scontrol", "update", f"nodename={name}", "state=down", "reason=power", check=True)

    def wait_nodes(self, timeout_s: float = 60) -> None:
        """Wait until every node takes jobs."""
        wait_until(lambda: {*self.node_states().values()} <= USABLE, timeout_s, "its nodes to be idle")

    def node_states(self) -> dict[str, str]:
        """Node -> state, in sinfo's words."""
        listed = self._command("sinfo", "-h", "-N", "-o", "%N %T").stdout.splitlines()
        states = dict(line.split() for line in listed if len(line.split()) == 2)
        return {name: states.get(name, "unknown") for name in self.layout.names}

    def _start_node(self, name: str) -> None:
        root = self.layout.path
        (root / "spool" / name).mkdir(exist_ok=True)
        log = root / "log" / f"{name}.out"
        if self.layout.mode == "multi":
            environment = {"SLURM_CONF": str(self.layout.conf), "GREENMOE_DEVNODE": f"{self.layout.root}:{name}"}
            self.pids[name] = start(["slurmd", "-D", "-N", name], log, environment)
            return
        unshare = ["unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        pid = start([*unshare, "bash", root / "node-init.sh", root, name, self.layout.address(name)], log, {})
        children = Path(f"/proc/{pid}/task/{pid}/children")
        wait_until(lambda: bool(children.read_text().split()), 10, f"the namespaces of {name}", 0.005)
        inside = children.read_text().split()[0]
        veth = f"v{name}"
        enter = ("nsenter", f"--net=/proc/{self.pids['ctl']}/ns/net", "--")
        run(*enter, "ip", "link", "del", veth, check=False)
        run(*enter, "ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", inside)
        run(*enter, "ip", "link", "set", veth, "master", "br0", "up")
        self.pids[name] = int(inside)

    def _check(self, name: str) -> None:
        if name not in self.layout.names:
            raise SiteError(f"there is no node {name!r}: the nodes are {', '.join(self.layout.names)}")

    # Small parts -----------------------------------------------------------------------------------------------------

    def _daemon(self, name: str, *command: object, inside: bool = True) -> None:
        enter: list[object] = []
        if inside and self.layout.mode == "netns":
            enter = ["nsenter", "-t", self.pids["ctl"], "-n", "-u", "-m", "--"]
        log = self.layout.path / "log" / f"{name}.out"
        self.pids[name] = start([*enter, *command], log, {"SLURM_CONF": str(self.layout.conf)})

    def _wait(self, name: str, condition: Any, timeout_s: float) -> None:
        def ready() -> bool:
            if not is_alive(self.pids[name]):
                log = self.layout.path / "log" / f"{name}.out"
                raise SiteError(f"{name} ended at its start: {log.read_text(errors='replace').strip()[-400:]}")
            return bool(condition())

        wait_until(ready, timeout_s, name)

    def _listens(self, host: str, port: int) -> bool:
        probe = f"exec 3<>/dev/tcp/{host}/{port}"
        enter = ["nsenter", f"--net=/proc/{self.pids['ctl']}/ns/net", "--"] if "ctl" in self.pids else []
        return run(*enter, "bash", "-c", probe, check=False).returncode == 0

    def _command(self, name: str, *arguments: str, check: bool = False) -> Any:
        return run(self.layout.path / "bin" / name, *arguments, check=check)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 2)

    def _save(self) -> None:
        state = {"layout": self.layout.to_json(), "pids": self.pids, "seconds": self.seconds}
        (self.layout.path / "cluster.json").write_text(json.dumps(state, indent=1))
