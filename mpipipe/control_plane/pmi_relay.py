"""Keeps what MPICH tells Slurm in MPI_Init short enough for `srun --mpi=pmi2`.

MPICH publishes 4,096 bytes of its UCX address, in pieces as long as Slurm says that a value may be
(1,024), each written as hexadecimal digits after some 55 characters of command. Slurm's pmi2 plugin
(22.05; in newer sources too) reads a command with one `read` of 1,024 bytes. A piece without zeros
does not fit: "value not properly terminated in client request", then a UCX error, or all ranks
hang. The address is shorter than 4,096, and what lies behind it in memory decides, so one launch
fails and the next does not.

Hence a small child process stands between the rank and Slurm for as long as MPI_Init takes (mpi4py
holds the GIL in it, so no thread could), and passes everything on, but names a shorter limit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from mpipipe.topology.launcher import Launcher, detect

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["MAX_COMMAND_BYTES", "MAX_VALUE_BYTES", "short_pmi_values"]

MAX_COMMAND_BYTES = 1024  # what Slurm reads at once
# `cmd=put kvsname=<job>.<step> key=<64 characters> value=` is 113 bytes at most, plus a newline.
# Even: MPICH rounds halves of it in two ways, which agree only then.
MAX_VALUE_BYTES = 900

# A command and its reply are one write each, and neither side writes before the other has answered.
_RELAY = """
import os, re, select, sys
server, client, limit = map(int, sys.argv[1:])
limited = b"vallen_max=%d" % limit
other = {server: client, client: server}
while True:
    for end in select.select([server, client], [], [])[0]:
        said = os.read(end, 65536)
        if not said:
            sys.exit()
        if end == server and said.startswith(b"cmd=maxes "):
            said = re.sub(rb"vallen_max=(\\d+)",
                          lambda told: limited if int(told[1]) > limit else told[0], said)
        while said:
            said = said[os.write(other[end], said):]
"""
# srun passes signals on to every process of a task. The relay lives as long as its rank does.
_NOT_FOR_THE_RELAY = {
    signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2,
}  # fmt: skip


@contextlib.contextmanager
def short_pmi_values(environ: Mapping[str, str]) -> Iterator[None]:
    """Let no value be longer than MAX_VALUE_BYTES while the body runs MPI_Init under srun.

    Does nothing under another launcher, or where srun gave no PMI socket. All ranks must do the
    same: a reader of values counts their pieces by the same limit. Costs one short-lived child
    process (about 20 ms).
    """
    told = environ.get("PMI_FD", "")
    if not told.isdecimal() or detect(environ).launcher is not Launcher.SRUN:
        yield
        return
    pmi = int(told)
    try:
        server = os.dup(pmi)
    except OSError:  # inherited from a parent that is a rank itself: MPI will say so
        yield
        return
    mine, relays = socket.socketpair()
    with mine, _relay_between(server, relays):
        relays.close()
        os.dup2(mine.fileno(), pmi)
        try:
            yield
        finally:
            os.dup2(server, pmi)  # from here on the rank and Slurm speak directly
            os.close(server)
            mine.close()  # what the relay waits for


def _relay_between(server: int, client: socket.socket) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", "-c", _RELAY]
    command += [str(server), str(client.fileno()), str(MAX_VALUE_BYTES)]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_THE_RELAY)
    try:
        return subprocess.Popen(command, pass_fds=(server, client.fileno()))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
