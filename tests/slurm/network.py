"""One machine as several hosts: a network namespace, host name and /dev/shm for each.

Not here: what runs on the hosts. Invariants: the namespaces' names carry the cluster's own prefix,
so clusters do not meet; `close` ends every process that still lives in them and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["HEAD", "NAMESPACES", "Network", "remove_namespace"]

HEAD = "head"
NAMESPACES = Path("/run/netns")
# nsenter, not `ip netns exec`: the latter mounts /sys anew, without the cgroups that slurmd wants.
_ENTER = """
set -e; name=$1; hosts=$2; shift 2
hostname "$name"; mount --bind "$hosts" /etc/hosts
[ "$name" = head ] || mount -t tmpfs tmpfs /dev/shm
exec "$@"
"""


class Network:
    """A bridge in the namespace of `head`, and one namespace per node on it."""

    def __init__(self, prefix: str, nodes: Sequence[str], hosts_file: Path) -> None:
        self.prefix = prefix
        self.addresses = {HEAD: "10.77.0.254"}
        self.addresses |= {name: f"10.77.0.{number}" for number, name in enumerate(nodes, 1)}
        self._hosts_file = hosts_file

    def open(self) -> None:
        """Make the namespaces and the links between them."""
        lines = [f"{address} {name}" for name, address in self.addresses.items()]
        self._hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        for name in self.addresses:
            _ip("netns", "add", self._namespace(name))
            self._in(name, "link", "set", "lo", "up")
        self._in(HEAD, "link", "add", "br0", "type", "bridge")
        for name, address in self.addresses.items():
            device = "br0" if name == HEAD else "eth0"
            if name != HEAD:
                self._in(
                    HEAD, "link", "add", f"to-{name}", "type", "veth",
                    "peer", "name", device, "netns", self._namespace(name),
                )  # fmt: skip
                self._in(HEAD, "link", "set", f"to-{name}", "master", "br0", "up")
            self._in(name, "addr", "add", f"{address}/24", "dev", device)
            self._in(name, "link", "set", device, "up")

    def enter(self, host: str, *, until_parent_dies: bool = False) -> list[str]:
        """The words before a command that runs it on `host`."""
        words = ["setpriv", "--pdeathsig", "KILL"] if until_parent_dies else []
        words += ["nsenter", f"--net={self._path(host)}"]
        words += ["unshare", "--uts", "--mount", "--propagation", "private", "--"]
        return [*words, "sh", "-c", _ENTER, "enter", host, str(self._hosts_file)]

    def reach(self, host: str) -> list[str]:
        """The words before a client that needs the network of `host` only: a tenth of the work."""
        return ["nsenter", f"--net={self._path(host)}"]

    def bytes_sent(self, host: str) -> int:
        """Bytes that left `host` through its network device so far."""
        links = json.loads(self._in(host, "-json", "-stats", "link", "show", "eth0"))
        return int(links[0]["stats64"]["tx"]["bytes"])

    def throttle(self, host: str, rate: str) -> None:
        """Let no more than `rate` (as tc writes it: 4mbit) leave `host`; nothing is dropped."""
        _run("tc", "-n", self._namespace(host), "qdisc", "add", "dev", "eth0", "root", "tbf",
             "rate", rate, "burst", "16kb", "latency", "60s")  # fmt: skip

    def processes(self, host: str) -> list[int]:
        """The ids of all processes on `host`."""
        return _processes(self._path(host))

    def cut_power(self, host: str) -> None:
        """The host falls silent: no peer is told, and its processes are gone."""
        self._in(host, "link", "set", "eth0", "down")
        self.kill_all(host)

    def kill_all(self, host: str) -> None:
        """End all processes of the host."""
        _kill_all(self._path(host))

    def close(self) -> None:
        """End what is left on the hosts, and remove them."""
        for name in self.addresses:
            if self._path(name).exists():
                remove_namespace(self._path(name))

    def _path(self, host: str) -> Path:
        return NAMESPACES / self._namespace(host)

    def _namespace(self, host: str) -> str:
        return f"{self.prefix}-{host}"

    def _in(self, host: str, *words: str) -> str:
        return _ip("-n", self._namespace(host), *words)


def remove_namespace(path: Path) -> None:
    """End all processes in a network namespace, then the namespace."""
    _kill_all(path)
    _ip("netns", "del", path.name)


def _processes(namespace: Path) -> list[int]:
    wanted = namespace.stat().st_ino
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "ns/net").stat().st_ino == wanted:
                found.append(int(entry.name))
    return found


def _kill_all(namespace: Path) -> None:
    """At once; again while some are being born, for 5 s."""
    for _ in range(100):
        alive = _processes(namespace)
        if not alive:
            return
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    raise RuntimeError(f"processes in {namespace} cannot be killed: {alive}")


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout
