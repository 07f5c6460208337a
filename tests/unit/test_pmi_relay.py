"""What stands between MPICH and Slurm's pmi2 plugin in MPI_Init, against a Slurm of a few lines."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpipipe.control_plane.pmi_relay import MAX_COMMAND_BYTES, MAX_VALUE_BYTES, short_pmi_values

LIMIT_S = 20.0
MAXES = b"cmd=maxes rc=0 kvsname_max=256 keylen_max=64 vallen_max=%d\n"


class Plugin:
    """Slurm's end: reads a command as its plugin does, with one read, and answers it."""

    def __init__(self, max_value_bytes: int = 1024) -> None:
        self.end, task = socket.socketpair()
        self.end.settimeout(LIMIT_S)
        self.task = task
        self.heard: list[bytes] = []
        self._maxes = MAXES % max_value_bytes
        self._thread = threading.Thread(target=self._serve)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.task.close()
        self._thread.join(LIMIT_S)
        self.end.close()

    def _serve(self) -> None:
        while command := self.end.recv(MAX_COMMAND_BYTES):
            self.heard.append(command)
            self.end.sendall(self._maxes if command == b"cmd=get_maxes\n" else b"cmd=ok\n")

    def environ(self, **other: str) -> dict[str, str]:
        step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
        return {**step, "PMI_FD": str(self.task.fileno()), "PMI_SIZE": "2", **other}

    def ask(self, command: bytes) -> bytes:
        """As MPICH does: one write to the descriptor that it was told, then the answer."""
        os.write(self.task.fileno(), command)
        return os.read(self.task.fileno(), 4096)


@pytest.fixture
def plugin() -> Iterator[Plugin]:
    plugin = Plugin()
    plugin.start()
    yield plugin
    plugin.close()


def test_the_longest_command_with_a_value_fits_into_one_read_of_slurm() -> None:
    kvsname = f"{2**32 - 1}.{2**32 - 1}"
    value = "F" * (MAX_VALUE_BYTES - 1)  # the last byte is C's
    command = f"cmd=put kvsname={kvsname} key={'k' * 64} value={value}\n"
    assert len(command) <= MAX_COMMAND_BYTES


def test_a_reader_and_a_writer_of_values_round_the_limit_alike() -> None:
    """MPICH's put cuts pieces of (limit - 2) / 2 bytes, its get joins them at (limit - 1) / 2."""
    assert (MAX_VALUE_BYTES - 2) // 2 == (MAX_VALUE_BYTES - 1) // 2


def test_the_limit_is_short_inside_and_slurms_own_after(plugin: Plugin) -> None:
    with short_pmi_values(plugin.environ()):
        assert plugin.ask(b"cmd=init pmi_version=1 pmi_subversion=1\n") == b"cmd=ok\n"
        assert plugin.ask(b"cmd=get_maxes\n") == MAXES % MAX_VALUE_BYTES
        longest = b"cmd=put value=" + b"F" * MAX_VALUE_BYTES + b"\n"
        assert plugin.ask(longest) == b"cmd=ok\n"
    assert plugin.heard[-1] == longest
    assert plugin.ask(b"cmd=get_maxes\n") == MAXES % 1024


def test_a_limit_that_is_shorter_already_stays() -> None:
    plugin = Plugin(max_value_bytes=512)
    plugin.start()
    with short_pmi_values(plugin.environ()):
        assert plugin.ask(b"cmd=get_maxes\n") == MAXES % 512
    plugin.close()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"MPI_LOCALRANKID": "0"}, id="mpiexec of MPICH"),
        pytest.param({"PMI_FD": ""}, id="no socket"),
        pytest.param({"PMI_FD": "9999"}, id="a socket that is closed"),
    ],
)
def test_nothing_stands_between_elsewhere(plugin: Plugin, other: dict[str, str]) -> None:
    with short_pmi_values(plugin.environ(**other)):
        assert plugin.ask(b"cmd=get_maxes\n") == MAXES % 1024


def test_a_failure_inside_gives_the_socket_back(plugin: Plugin) -> None:
    with pytest.raises(RuntimeError), short_pmi_values(plugin.environ()):
        raise RuntimeError
    assert plugin.ask(b"cmd=get_maxes\n") == MAXES % 1024


def test_the_relay_outlives_signals_that_srun_sends_to_all_processes_of_a_task(
    plugin: Plugin,
) -> None:
    before = _children()  # other tests of this process may have left some
    with short_pmi_values(plugin.environ()):
        (relay,) = _children() - before
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(relay, number)
        assert plugin.ask(b"cmd=get_maxes\n") == MAXES % MAX_VALUE_BYTES
    assert relay not in _children()


def _children() -> set[int]:
    """The ids of this process's children."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            if int(fields[1]) == os.getpid():
                found.add(int(entry.name))
    return found
