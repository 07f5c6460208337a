"""What this process and its node have used so far: CPU, memory, files, network.

Read from /proc, in 0.1 ms and 0.02 ms a thread; what a container or kernel does not tell is None.
Counters only grow: who wants a rate takes the difference of two readings. Linux only.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpipipe.topology.host import read_text

__all__ = ["COMPUTE_THREAD", "Usage", "name_thread", "read_usage"]

COMPUTE_THREAD = "compute"  # the name of the thread that runs a CPU's steps
_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of this process, but for the node's."""

    cpu_s: float | None = None  # of all its threads
    rss_bytes: int | None = None  # now
    io_read_bytes: int | None = None  # that came from storage, not from the page cache
    io_write_bytes: int | None = None
    read_call_bytes: int | None = None  # that calls have read, from page cache and storage
    num_read_calls: int | None = None
    node_busy_s: float | None = None  # of all cores together
    node_idle_s: float | None = None  # waiting for storage included
    net_rx_bytes: int | None = None  # of the node's interfaces but loopback
    net_tx_bytes: int | None = None
    # How often a thread of the process was put aside for another process: its core is shared.
    num_involuntary_switches: int | None = None
    # The thread that computes could have run, and others had its core; None on a GPU.
    run_delay_s: float | None = None

    def fields(self, before: Usage, elapsed_s: float) -> dict[str, Any]:
        """The fields of a sample that come from here.

        `cpu_percent` is of one core, `node_cpu_percent` of all cores of the node, both since the
        reading `before`, `elapsed_s` ago; None where that is `Usage()`.
        """
        cpu_s = _difference(self.cpu_s, before.cpu_s)
        busy_s = _difference(self.node_busy_s, before.node_busy_s)
        idle_s = _difference(self.node_idle_s, before.node_idle_s)
        node_s = None if busy_s is None or idle_s is None else busy_s + idle_s
        return {
            "cpu_percent": _percent(cpu_s, elapsed_s),
            "node_cpu_percent": _percent(busy_s, node_s),
            "rss_bytes": self.rss_bytes,
            "io_read_bytes": self.io_read_bytes,
            "io_write_bytes": self.io_write_bytes,
            "net_rx_bytes": self.net_rx_bytes,
            "net_tx_bytes": self.net_tx_bytes,
            "num_involuntary_switches": self.num_involuntary_switches,
            "run_delay_s": self.run_delay_s,
        }


def _difference(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier


def _percent(part: float | None, whole: float | None) -> float | None:
    return round(100 * part / whole, 1) if part is not None and whole else None


def read_usage(root: Path = _ROOT) -> Usage:
    """This moment's counters."""
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    # The second field is the command in parentheses, which may hold spaces.
    fields = read_text(root / "proc/self/stat").rpartition(")")[2].split()
    pages = read_text(root / "proc/self/statm").split()
    files = _keyed(read_text(root / "proc/self/io"))
    node = _node_ticks(root)
    received, sent = _network_bytes(root)
    return Usage(
        cpu_s=(int(fields[11]) + int(fields[12])) / ticks_per_s if len(fields) > 12 else None,
        rss_bytes=int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None,
        io_read_bytes=files.get("read_bytes"),
        io_write_bytes=files.get("write_bytes"),
        read_call_bytes=files.get("rchar"),
        num_read_calls=files.get("syscr"),
        node_busy_s=None if node is None else node[0] / ticks_per_s,
        node_idle_s=None if node is None else node[1] / ticks_per_s,
        net_rx_bytes=received,
        net_tx_bytes=sent,
        num_involuntary_switches=_involuntary_switches(root),
        run_delay_s=_run_delay_s(root),
    )


def _keyed(text: str) -> dict[str, int]:
    """Lines of `key: number`."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {key: int(value) for key, _, value in pairs if value.strip().isdigit()}


def _involuntary_switches(root: Path) -> int | None:
    """Of the threads that live; those of one that has ended are gone, so it may become less."""
    threads = [_keyed(read_text(path)) for path in root.glob("proc/self/task/*/status")]
    counts = [thread.get("nonvoluntary_ctxt_switches", 0) for thread in threads]
    return sum(counts) if counts else None


def name_thread(name: str, root: Path = _ROOT) -> None:
    """Give the calling thread a name of at most 15 letters, as `top` and `perf` show it."""
    with suppress(OSError):  # no Linux
        (root / f"proc/self/task/{threading.get_native_id()}/comm").write_text(name)


def _run_delay_s(root: Path) -> float | None:
    """The second number of `schedstat`, in nanoseconds."""
    for path in root.glob("proc/self/task/*/comm"):
        numbers = read_text(path.with_name("schedstat")).split()
        if read_text(path).strip() == COMPUTE_THREAD and len(numbers) > 1:
            return round(int(numbers[1]) / 1e9, 6)
    return None


def _node_ticks(root: Path) -> tuple[int, int] | None:
    """Busy and idle, of all cores: user nice system idle iowait irq softirq steal; then guests,
    which are in user and nice.
    """
    name, *words = [*read_text(root / "proc/stat").partition("\n")[0].split(), ""]
    ticks = [int(word) for word in words if word.isdigit()][:8]
    if name != "cpu" or len(ticks) < 8:
        return None
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, idle


def _network_bytes(root: Path) -> tuple[int | None, int | None]:
    """Received and sent; the first and the ninth number of an interface."""
    received: int | None = None
    sent: int | None = None
    for line in read_text(root / "proc/net/dev").splitlines():
        name, colon, numbers = line.partition(":")
        words = numbers.split()
        if colon and name.strip() != "lo" and len(words) >= 9 and words[0].isdigit():
            received = (received or 0) + int(words[0])
            sent = (sent or 0) + int(words[8])
    return received, sent
