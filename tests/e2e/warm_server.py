"""Processes that begin with torch and mpipipe imported: forks of one that has imported them once.

Of the CPU time of a rank of the tiny model, nine tenths go into imports. Where a test is about what
a run does and not about how a process starts and ends, its launch takes `warm_python()` for Python:
the launcher starts `warm_client`, and a fork of the server does the work in its place.

Not here: MPI, which each process loads for itself, nor what mpipipe imports for some models and
devices only. Such processes have one hash seed. The server has one thread, so that a fork is a
whole process, and ends with the tests.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mpipipe

__all__ = ["warm_python"]

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).with_name("warm_client.py")
MAX_REQUEST = 1 << 18  # bytes: words and environment
MAX_FDS = 8
HIGH_FD = 200  # above all that a server has open
LEFT_OUT = (
    "mpipipe.__main__", "mpipipe.control_plane.mpi", "mpipipe.data_plane.mpi", "mpipipe.gguf_model",
    "mpipipe.models.kernels.", "mpipipe.models.template_process",
)  # fmt: skip
LATE = ("structlog", "tokenizers", "typer._adapters")  # imported where they are used first


@functools.cache
def warm_python() -> Sequence[str]:
    """The words in front of `-m MODULE …` or `SCRIPT …`; the first call starts the server."""
    name = f"mpipipe-warm-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{name}")
        listener.listen(64)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.warm_server", str(listener.fileno())],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,  # ends with this process, and then so does the server
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
    atexit.register(server.communicate)
    return (sys.executable, "-I", "-S", str(CLIENT), name)


class _Server:
    """Forks a process for each connection, and says on it how the process ended."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._clients: dict[int, socket.socket] = {}  # by process
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(0, selectors.EVENT_READ, lambda: sys.exit)

    def serve(self) -> Callable[[], object]:
        """Until the tests end; returns in each fork, too, with what is to be done now."""
        while True:
            for key, _ in self._selector.select():
                work: Callable[[], object] | None = key.data()
                if work is not None:
                    return work

    def _accept(self) -> Callable[[], object] | None:
        client, _ = self._listener.accept()
        data, numbers, _, _ = socket.recv_fds(client, MAX_REQUEST, MAX_FDS)
        child = os.fork() if data else -1
        if child == 0:
            self._forget(client)
            return functools.partial(_become, json.loads(data), numbers)
        for number in numbers:
            os.close(number)
        if not data:  # it was killed before it had asked
            client.close()
            return None
        self._clients[child] = client
        ended = os.pidfd_open(child)
        done = functools.partial(self._done, child, ended)
        self._selector.register(ended, selectors.EVENT_READ, done)
        # A client says nothing more: this is its end.
        self._selector.register(client, selectors.EVENT_READ, functools.partial(self._kill, child))
        return None

    def _forget(self, client: socket.socket) -> None:
        """In the fork: what is the server's is closed, but for its standard streams."""
        os.setpgid(0, 0)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
            elif key.fd > 2:
                os.close(key.fd)
        client.close()
        self._selector.close()

    def _done(self, child: int, ended: int) -> None:
        _, status = os.waitpid(child, 0)
        self._selector.unregister(ended)
        os.close(ended)
        if client := self._hang_up(child):
            with client, contextlib.suppress(OSError):  # it was killed just now
                client.send(b"%d" % os.waitstatus_to_exitcode(status))

    def _kill(self, child: int) -> None:
        """The launcher has killed the client, and means the process."""
        if client := self._hang_up(child):
            client.close()
            os.killpg(child, signal.SIGKILL)

    def _hang_up(self, child: int) -> socket.socket | None:
        client = self._clients.pop(child, None)
        if client is not None:
            self._selector.unregister(client)
        return client


def _become(request: dict[str, Any], numbers: Sequence[int]) -> None:
    """Be what was asked for: `python WORDS…` with that environment, folder and files."""
    high = [os.dup2(number, HIGH_FD + place) for place, number in enumerate(numbers)]
    for number in numbers:
        os.close(number)
    for number, wanted in zip(high, request["numbers"], strict=True):
        os.dup2(number, wanted)
        os.close(number)
    os.sched_setaffinity(0, request["cores"])
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["folder"])
    for module in (mpipipe, importlib.import_module("mpipipe.cli.run")):
        vars(module)["IMPORTED_S"] = time.perf_counter()  # a boot is this process's
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]
    first, *rest = request["words"]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def _import_all() -> None:
    for module in pkgutil.walk_packages(mpipipe.__path__, "mpipipe."):
        if not module.name.startswith(LEFT_OUT):
            importlib.import_module(module.name)
    for name in LATE:
        importlib.import_module(name)
    assert not {"mpi4py.MPI", "transformers", "triton"} & sys.modules.keys()
    assert len(os.listdir("/proc/self/task")) == 1, "threads would be missing in a fork"


def main() -> None:
    """Import, then fork until the tests end."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    _import_all()
    gc.freeze()
    _Server(listener).serve()()


if __name__ == "__main__":
    main()
