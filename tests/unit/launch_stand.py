"""Stand-ins for Slurm, the container and mpipipe itself, for tests of the launch scripts.

Not here: what must hold. Every stand-in writes down what it was asked for; how it answers is in the
environment.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

__all__ = ["LAUNCH", "Stand"]

LAUNCH = Path(__file__).parents[2] / "launch"
# `waits NAME`: a stand-in that is to wait there says so, and goes on when it is told.
WAITS = (
    """waits() { [ "${WAITS_AT:-}" != "$1" ] || { echo ready >"$FIFO"; read -r _ <"$FIFO"; }; }"""
)
PROGRAMS = {
    "srun": """
        echo "srun $*" >>"$CALLS"
        case $1 in --mpi=list) echo "MPI plugin types are... none pmi2"; exit 0 ;; esac
        while [ $# -gt 0 ]; do case $1 in --*) shift ;; *) break ;; esac; done
        exec "$@" """,
    "mpipipe": """
        case "$1 $2" in
        "slurm workspace") echo "workspace $*" >>"$CALLS"
            mkdir -p "${!#}/demo-7"
            printf 'config=/copy.toml models=("%s") words=(a.b=c output.dir=/o)\\n' \
                "$MODEL" >"${!#}/demo-7/job.env"
            echo "${!#}/demo-7/job.env" ;;
        "slurm mpi-flag") waits flag; echo pmi2 ;;
        doctor*) exit "${DOCTOR_CODE:-0}" ;;
        run*) waits deaf
            [ -z "${RUN_ADDS:-}" ] || echo "{}" >>"$OUTPUTS/completions_rank_0.jsonl"
            [ -z "${RUN_WAITS:-}" ] || { trap 'exit 75' USR1; echo ready >"$RUN_WAITS"
                while :; do sleep 0.01; done; }
            exit "${RUN_CODE:-0}" ;;
        esac""",
    "scontrol": """
        echo "scontrol $*" >>"$CALLS"
        [ "$1" != show ] || waits show
        [[ $* != *"show job"* || -z ${RECORD:-} ]] || echo "$RECORD"
        [ "$1" != requeue ] || exit "${REQUEUE_CODE:-1}" """,
    "squeue": 'echo "squeue $*" >>"$CALLS"',
    "sacct": """
        echo "sacct $*" >>"$CALLS"
        printf "JobID|State\\n7|RUNNING\\n7.0|COMPLETED\\n" """,
    "sbatch": 'echo "sbatch $* account=${SBATCH_ACCOUNT:-}" >>"$CALLS"',
    "apptainer": """
        echo "apptainer $*" >>"$CALLS"
        env >"$IMAGE_ENV"
        [[ $* == *--version ]] || exit "${IMAGE_CODE:-0}" """,
    "hostname": "echo node",
}


class Stand:
    """A login and compute node of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self.model = folder / "model"
        self.job = folder / "scratch/demo-7"
        self.bin = folder / "venv/bin"
        self.environ: dict[str, str] = {}

    def build(self) -> Stand:
        self.bin.mkdir(parents=True)
        self.model.mkdir()
        for name, text in PROGRAMS.items():
            self.program(name, text)
        self.environ = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "CALLS": str(self.calls),
            "MODEL": str(self.model),
            "IMAGE_ENV": str(self.folder / "image.env"),
            "OUTPUTS": str(self.job / "outputs"),
            "FIFO": str(self.folder / "fifo"),
            "SLURM_JOB_ID": "7",
            "MPIPIPE_SCRATCH": str(self.folder / "scratch"),
            "MPIPIPE_VENV": str(self.folder / "venv"),
        }
        return self

    def program(self, name: str, text: str) -> None:
        """A stand-in of that name, which does what `text` says to bash."""
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{WAITS}\n{text}\n")
        path.chmod(0o755)

    def start(
        self, script: str, *words: str, environ: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(LAUNCH / script), *words],
            env=self.environ | dict(environ or {}),
            cwd=LAUNCH.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *words: str, **environ: str) -> tuple[int, str]:
        process = self.start(script, *words, environ=environ)
        text, _ = process.communicate(timeout=120)
        return process.returncode, text

    def asked(self, program: str) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if line.startswith(program)]
