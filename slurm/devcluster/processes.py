"""Starting, finding and killing the processes of a cluster."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from hpc.errors import SiteError

SYSTEM_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"


def require(programs: Iterable[str], package_hint: str) -> None:
    """Raise SiteError when a program is not installed."""
    missing = [name for name in programs if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        raise SiteError(f"the dev cluster needs {', '.join(missing)}: {package_hint}")


def run(*command: object, check: bool = True, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a command of the system. Raises SiteError with its words when it fails."""
    words = [str(word) for word in command]
    result = subprocess.run(
        words, text=True, capture_output=True, env={**os.environ, "PATH": SYSTEM_PATH, **(env or {})}
    )
    if check and result.returncode:
        raise SiteError(f"{' '.join(words[:4])} failed: {(result.stderr or result.stdout).strip()}")
    return result


def start(command: list[object], log: Path, env: dict[str, str]) -> int:
    """Start a daemon in a session of its own; returns its process id."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "PATH": SYSTEM_PATH, **env},
            start_new_session=True,
        )
    return process.pid


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, step_s: float = 0.05) -> None:
    """Wait for something. Raises SiteError when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SiteError(f"the dev cluster waited {timeout_s:.0f} s for {what}: see its log folder")
        time.sleep(step_s)


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Iterable[psutil.Process], number: int = signal.SIGKILL, timeout_s: float = 5) -> None:
    """Signal processes and wait until they are gone; those that stay are killed."""
    alive = list(processes)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    _, stubborn = psutil.wait_procs(alive, timeout=timeout_s)
    for process in stubborn:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def with_environment(name: str, value: str) -> list[psutil.Process]:
    """Every process that was started with NAME=VALUE, and all below it."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(name) == value:
                found.update((one.pid, one) for one in tree(process.pid))
    return list(found.values())
