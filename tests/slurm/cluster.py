"""A Slurm cluster on one machine, for as long as this process lives.

`python -m tests.slurm` keeps one for trying things by hand. Every node is a slurmd in its
own network namespace; munge, slurmctld, slurmdbd and MariaDB have their own keys, ports and folder,
so nothing of a real Slurm on the machine is touched. Not here: what the jobs are. Invariants: the
daemons are children of this process and die with it; `close` leaves no process, namespace or file
behind, and `open` removes what a killed process could not.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.slurm.caretaker import Caretaker
from tests.slurm.network import HEAD, NAMESPACES, Network, remove_namespace
from tests.slurm.packages import ClusterUnavailableError, install_missing
from tests.slurm.settings import slurm_conf, slurmdbd_conf

__all__ = ["Cluster", "until"]

PREFIX = "mpipipe-slurm-"
# For a machine that is three times slower than two cores of 2025, and busy with other suites.
UP_LIMIT_S = 120
COMMAND_LIMIT_S = 300
CLIENT_LIMIT_S = 60
# Two nodes for jobs; two for what ends within seconds; three of which one may die; two for arrays.
PARTITIONS = {"main": "n1,n2", "short": "n3,n4", "fragile": "n5,n6,n7", "arrays": "n8,n9"}
NODES = tuple(name for members in PARTITIONS.values() for name in members.split(","))


def _sweep() -> None:
    """Remove what clusters left behind whose process was killed."""
    for place in (NAMESPACES, Path(tempfile.gettempdir())):
        for path in place.glob(f"{PREFIX}*"):
            owner = path.name.removeprefix(PREFIX).partition("-")[0]
            if _lives(owner):
                continue
            if place == NAMESPACES:
                remove_namespace(path)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _lives(process: str) -> bool:
    try:
        return bool(Path("/proc", process, "cmdline").read_bytes())  # a zombie has none
    except OSError:
        return False


# Each answer of Slurm takes 20 ms of a core, and six stories ask beside the ranks they watch.
CLIENT_PAUSE_S = 0.7


def until(
    done: Callable[[], bool], what: str, limit_s: float = UP_LIMIT_S, pause_s: float = 0.1
) -> None:
    """Ask `done` until it says yes, with pauses.

    Raises:
        TimeoutError: it did not within `limit_s`; the sentence names `what`.
    """
    end = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {limit_s:.0f} s for {what}")
        time.sleep(pause_s)


class Cluster:
    """The running cluster: commands on its hosts, and what became of jobs."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self.network = Network(f"{PREFIX}{os.getpid()}", NODES, self.folder / "hosts")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.restarts: list[str] = []  # what was seen before each
        self._caretaker = Caretaker(
            [node for node in NODES if node not in PARTITIONS["fragile"].split(",")],
            lambda: self.ask("sinfo", "--noheader", "--Node", "--format=%N %T"),
            self.restart,
            lambda node, state: self.restarts.append(f"{node} was {state}\n{self.situation()}"),
        )

    # -- life --------------------------------------------------------------------------------

    def open(self) -> None:
        """Bring everything up.

        Raises:
            ClusterUnavailableError: packages, or a daemon that did not come up, with its log.
        """
        install_missing()
        _sweep()
        self._write_files()
        try:
            self.network.open()
            self._start_accounting()
            self._start_slurm()
        except (TimeoutError, RuntimeError, subprocess.SubprocessError) as error:
            raise ClusterUnavailableError(
                f"the test cluster did not come up: {error}\n{self.logs()}"
            ) from error

    def close(self) -> None:
        """End all daemons, then whatever is left in the namespaces, then the files."""
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in reversed(self._daemons.values()):
            try:
                daemon.wait(timeout=5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.network.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def logs(self, lines: int = 15) -> str:
        """The last lines of every daemon's log."""
        parts = []
        for path in sorted((self.folder / "log").glob("*")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"--- {path.name}", *tail]))
        return "\n".join(parts)

    # -- commands ----------------------------------------------------------------------------

    def command(self, host: str, *words: str) -> list[str]:
        """The full command that runs `words` on `host`."""
        return [*self.network.enter(host), "env", f"SLURM_CONF={self.conf}", *words]

    def on(
        self,
        host: str,
        *words: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        limit_s: float = COMMAND_LIMIT_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on `host`, output captured; the exit code is the caller's to judge."""
        return subprocess.run(
            self.command(host, *words),
            env=dict(env) if env is not None else None,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def ask(self, *words: str) -> str:
        """What a Slurm client prints on the head; RuntimeError when it fails."""
        # The controller is known by its address; the accounting's host has only a name.
        is_quick = words[0] in ("scontrol", "sinfo")
        enter = self.network.reach(HEAD) if is_quick else self.network.enter(HEAD)
        result = subprocess.run(
            [*enter, "env", f"SLURM_CONF={self.conf}", *words],
            capture_output=True, text=True, timeout=CLIENT_LIMIT_S, check=False,
        )  # fmt: skip
        if result.returncode:
            raise RuntimeError(f"{' '.join(words)}: {result.stderr.strip()}")
        return result.stdout

    # -- jobs --------------------------------------------------------------------------------

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`, such as JobState, ExitCode, Restarts."""
        text = self.ask("scontrol", "--oneliner", "show", "job", job_id)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait_for_state(self, job_id: str, *states: str, limit_s: float = 90) -> dict[str, str]:
        """The job's fields once it is in one of `states`."""
        fields: dict[str, str] = {}

        def reached() -> bool:
            self._caretaker.look()
            fields.update(self.job(job_id))
            return fields["JobState"] in states

        try:
            what = f"job {job_id} to be {' or '.join(states)}"
            until(reached, what, limit_s, CLIENT_PAUSE_S)
        except TimeoutError as error:
            state = f"{fields.get('JobState')} ({fields.get('Reason')})"
            raise TimeoutError(f"{error}; it is {state}\n{self.situation()}") from None
        return fields

    def situation(self) -> str:
        """Nodes and jobs as Slurm sees them, what runs on the nodes, and the ends of all logs."""
        parts = [
            self.ask("sinfo", "--Node", "--long"),
            self.ask("sinfo", "--list-reasons"),
            self.ask("squeue", "--long"),
        ]
        for name in NODES:
            parts.append(f"--- processes of {name}")
            for process in self.network.processes(name):
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ")
                    parts.append(f"{process} {words.decode(errors='replace')[:150]}")
        return "\n".join([*parts, self.logs(60)])

    # -- parts -------------------------------------------------------------------------------

    @property
    def conf(self) -> Path:
        """The cluster's slurm.conf, for SLURM_CONF."""
        return self.folder / "slurm.conf"

    def _write_files(self) -> None:
        self.folder.chmod(0o755)
        for name in ("munge", "state", "log", "database"):
            (self.folder / name).mkdir()
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        addresses = self.network.addresses
        nodes = {name: addresses[name] for name in NODES}
        self.conf.write_text(slurm_conf(self.folder, addresses[HEAD], nodes, PARTITIONS))
        accounting = self.folder / "slurmdbd.conf"
        accounting.touch(mode=0o600)
        accounting.write_text(slurmdbd_conf(self.folder, addresses[HEAD]))
        script = self.folder / "on"  # for people: $folder/on head srun hostname
        inner = " ".join(f"'{word}'" for word in self.network.enter("HOST"))
        inner = inner.replace("HOST", """'"$host"'""")
        script.write_text(
            f'#!/bin/sh\nhost=$1; shift\nexport SLURM_CONF={self.conf}\nexec {inner} "$@"\n'
        )
        script.chmod(0o755)

    def _daemon(self, name: str, host: str, *words: str, **environ: str) -> None:
        log = (self.folder / "log" / f"{name}.out").open("wb")
        with log:
            daemon = subprocess.Popen(
                [*self.network.enter(host, until_parent_dies=True), *words],
                env={**os.environ, "SLURM_CONF": str(self.conf), **environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons[name] = daemon

    def _ready(self, *words: str) -> bool:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                raise RuntimeError(f"{name} ended with exit code {daemon.returncode}")
        return self.on(HEAD, *words, limit_s=CLIENT_LIMIT_S).returncode == 0

    def _start_accounting(self) -> None:
        munge, database = self.folder / "munge", self.folder / "database"
        self._daemon(
            "munged", HEAD, "munged", "--foreground", f"--key-file={munge}/key",
            f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--log-file={munge}/log",
            f"--seed-file={munge}/seed", "--num-threads=2",
        )  # fmt: skip
        subprocess.run(
            [
                "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={database}",
                "--auth-root-authentication-method=socket", "--auth-root-socket-user=root",
                "--skip-test-db",
            ],
            capture_output=True, timeout=60, check=True,
        )  # fmt: skip
        socket = f"{database}/socket"
        self._daemon(
            "mariadbd", HEAD, "mariadbd", "--no-defaults", "--user=root", f"--datadir={database}",
            f"--socket={socket}", f"--pid-file={database}/pid", "--skip-networking",
            "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
        )  # fmt: skip
        until(lambda: self._ready("mariadb", "-S", socket, "-e", "select 1"), "MariaDB")
        # slurmdbd names the server `localhost`; libmariadb takes the socket's path from here.
        self._daemon("slurmdbd", HEAD, "slurmdbd", "-D", MYSQL_UNIX_PORT=socket)
        until(lambda: self._ready("sacctmgr", "-n", "list", "cluster"), "slurmdbd")
        for words in (
            ("cluster", "lab"),
            ("account", "lab", "Cluster=lab"),
            ("user", "root", "Account=lab"),
        ):
            self.ask("sacctmgr", "-i", "add", *words)

    def _start_slurm(self) -> None:
        self._daemon("slurmctld", HEAD, "slurmctld", "-D", "-i")
        for name in NODES:
            (self.folder / f"spool.{name}").mkdir()
            (self.folder / f"tmp.{name}").mkdir()
            self._start_node(name)

        def idle() -> bool:
            states = self.on(
                HEAD, "sinfo", "-h", "-N", "-o", "%T", limit_s=CLIENT_LIMIT_S
            ).stdout.split()
            return states == ["idle"] * len(NODES)

        until(lambda: self._ready("true") and idle(), "idle nodes")

    def _start_node(self, name: str) -> None:
        self._daemon(f"slurmd.{name}", name, "slurmd", "-D", "-N", name)

    def restart(self, name: str) -> None:
        """Power-cycle a node: what runs on it is lost."""
        self.ask("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=restarted")
        self.network.kill_all(name)
        self._daemons[f"slurmd.{name}"].wait()
        self._start_node(name)  # it is back in service as soon as it registers
