"""Two hosts on one machine: network namespaces joined by a cable, and a namespace without any route."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """One network namespace.

    Attributes:
        name: of the namespace.
        address: of its interface.
        interface: its end of the cable.
    """

    name: str
    address: str
    interface: str

    def command(self, *command: str) -> list[str]:
        """Returns a command that runs on this host."""
        return ["ip", "netns", "exec", self.name, *command]


def missing_for_namespaces() -> str | None:
    """Returns what is missing for network namespaces, or None."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    if shutil.which("ip") is None:
        return "needs ip (apt-get install iproute2) for network namespaces"
    trial = subprocess.run(["unshare", "--net", "true"], capture_output=True)
    return None if trial.returncode == 0 else "needs a kernel that allows network namespaces"


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Yields two namespaces that reach each other and nothing else."""
    _delete_orphans()
    pid = os.getpid()
    hosts = (
        Host(f"host-a-{pid}", "10.231.7.1", f"va{pid}"),
        Host(f"host-b-{pid}", "10.231.7.2", f"vb{pid}"),
    )
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip("link", "add", hosts[0].interface, "type", "veth", "peer", hosts[1].interface)
        for host in hosts:
            _ip("link", "set", host.interface, "netns", host.name)
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", "lo", "up")
            _ip("-n", host.name, "link", "set", host.interface, "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


@contextmanager
def ended_with(processes: list[subprocess.Popen]) -> Iterator[None]:
    """Ends what still runs of `processes` with the block: a failing test leaves nothing behind."""
    try:
        yield
    finally:
        alive = [process for process in processes if process.poll() is None]
        for process in alive:
            process.terminate()  # torchrun passes it on, and kills its ranks after 30 s
        for process in alive:
            try:
                process.wait(timeout=45)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def without_a_route(*command: str) -> list[str]:
    """Returns a command that runs where only the loopback exists."""
    return ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


def _delete_orphans() -> None:
    """Deletes namespaces whose test was killed before it could."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name, pid in re.findall(r"^(host-[ab]-(\d+))\b", listed, re.M):
        if not Path(f"/proc/{pid}").exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
