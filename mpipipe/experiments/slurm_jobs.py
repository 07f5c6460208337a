"""An experiment as Slurm jobs: an array with a task for each case, and a last job that sums up.

A task runs all repeats of its case in one allocation, so cases are interleaved by Slurm, if at all.
Cases on different numbers of nodes are arrays of their own, as all tasks of an array get the same.
The texts are pure; `submit` hands them to sbatch.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpipipe.errors import EnvironmentSetupError
from mpipipe.experiments.record import Matrix
from mpipipe.run_folder.files import write_whole
from mpipipe.topology.command import Runner, run_child

__all__ = ["JobScript", "job_scripts", "submit"]

_SUBMIT_LIMIT_S = 60.0
_REPORT_MINUTES = 15
_SLACK_S = 60.0  # of each launch, beside its time limit: srun begins, a run that is late ends


@dataclass(frozen=True, slots=True)
class JobScript:
    """A batch script and its name in the experiment's folder."""

    name: str
    text: str


def job_scripts(
    matrix: Matrix, folder: Path, command: Sequence[str], missing: Sequence[str]
) -> tuple[list[JobScript], JobScript]:
    """The arrays over the cases `missing` something, and the job that follows them.

    `command` is the experiment's own, without what is about submission.
    """
    arrays = []
    cases = [case for case in matrix.cases if case.name in missing]
    for nodes in sorted({case.num_nodes for case in cases}):
        chosen = [case for case in cases if case.num_nodes == nodes]
        per_node = max(-(-case.num_ranks // nodes) for case in chosen)
        minutes = math.ceil((matrix.repeat + 1) * (matrix.timeout_s + _SLACK_S) / 60)
        head = [
            f"#SBATCH --nodes={nodes}",
            f"#SBATCH --ntasks-per-node={per_node}",
            f"#SBATCH --array=0-{len(chosen) - 1}",
            f"#SBATCH --time={minutes}",
            _output(folder, "slurm-%A_%a.log"),
        ]
        body = [
            f"cases=({shlex.join(case.name for case in chosen)})",
            f'exec {shlex.join(command)} --case "${{cases[$SLURM_ARRAY_TASK_ID]}}"',
        ]
        name = f"{matrix.experiment}_{nodes}_nodes.sbatch"
        arrays.append(JobScript(name, _script(matrix, [*head], body)))
    head = [
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks=1",
        f"#SBATCH --time={_REPORT_MINUTES}",
        _output(folder, "slurm-%j.log"),
    ]
    body = [
        "code=0",
        f"{shlex.join(command)} --table || code=$?",
        f"{shlex.join([*command[:3], 'report', str(folder)])} || code=${{code/#0/$?}}",
        'exit "$code"',
    ]
    return arrays, JobScript(f"{matrix.experiment}_report.sbatch", _script(matrix, head, body))


def _output(folder: Path, name: str) -> str:
    """Quoted as for a shell, which sbatch reads alike; a % of the folder is no symbol."""
    path = f"{folder}".replace("%", "%%")
    return f"#SBATCH --output={shlex.quote(f'{path}/{name}')}"


def _script(matrix: Matrix, head: Sequence[str], body: Sequence[str]) -> str:
    """The environment is the submitting shell's, which sbatch hands on: modules, variables."""
    lines = [
        "#!/usr/bin/env bash",
        "# Written by `mpipipe bench --sbatch`.",
        f"#SBATCH --job-name=mpipipe-{matrix.experiment}",
        *head,
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        "export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false",
        *body,
    ]
    return "\n".join(lines) + "\n"


def submit(
    arrays: Sequence[JobScript],
    last: JobScript,
    folder: Path,
    options: Sequence[str],
    run: Runner = run_child,
) -> tuple[list[str], str]:
    """Write and submit the scripts; returns the ids of the arrays and of the last job.

    `options` are handed to sbatch, for the arrays only: the last job needs no GPU.

    Raises:
        EnvironmentSetupError: there is no sbatch, or it refuses a job.
    """
    ids = [_sbatch(folder, script, options, run) for script in arrays]
    after = [f"--dependency=afterany:{':'.join(ids)}"] if ids else []
    plain = [word for word in options if not word.startswith(("--gres", "--gpus", "--nodes"))]
    return ids, _sbatch(folder, last, [*plain, *after], run)


def _sbatch(folder: Path, script: JobScript, options: Sequence[str], run: Runner) -> str:
    path = folder / script.name
    write_whole(path, script.text.encode())
    try:
        result = run(("sbatch", "--parsable", *options, str(path)), _SUBMIT_LIMIT_S)
    except OSError as error:
        raise EnvironmentSetupError(
            f"sbatch could not be started ({error}): --sbatch needs a login node of a Slurm "
            "cluster; without it the launches run here"
        ) from error
    if result.returncode:
        raise EnvironmentSetupError(
            f"sbatch refused {path}: {' '.join(result.stderr.split())}; its options can be given "
            "with --sbatch-option, or as SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_GRES …"
        )
    return result.stdout.strip().partition(";")[0]
