"""What the end of a Slurm job means, in a user's words; and the sbatch options that it had.

Pure: from the fields that `slurm` has read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mpipipe.errors import (
    EXIT_BUG,
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_PEER_LOST,
    EXIT_PROMPTS,
    EXIT_REQUEUE,
)

__all__ = ["meaning_of_end", "sbatch_options"]

_STATES = {
    "OUT_OF_MEMORY": "the job's memory limit was reached: ask for more with --mem=",
    "TIMEOUT": "the wall time was over: ask for more with --time=",
    "DEADLINE": "the job's deadline was reached",
    "NODE_FAIL": "a node of the job failed",
    "BOOT_FAIL": "a node of the job did not start",
    "PREEMPTED": "another job took its place",
    "CANCELLED": "it was ended from outside (scancel, or an administrator)",
    "REVOKED": "another cluster started it",
}
_CODES = {
    EXIT_BUG: "unexpected: a bug of mpipipe, or a command that failed before it",
    EXIT_CONFIG: "configuration, plan or output folder",
    EXIT_CHECKPOINT: "model folder",
    EXIT_PROMPTS: "some prompts became error records",
    EXIT_ENVIRONMENT: "MPI, ranks, memory or devices",
    EXIT_PEER_LOST: "a rank was lost",
    EXIT_REQUEUE: "told to stop, can go on",
    EXIT_INTERRUPTED: "interrupted",
    126: "a command could not be started",
    127: "a command was not found",
}
_SIGNALS = {9: "SIGKILL, often for lack of memory", 15: "SIGTERM", 10: "SIGUSR1", 11: "SIGSEGV"}
# What launch/submit.sbatch asks for: options that say the same need not be repeated.
_DEFAULTS = {
    "--nodes": "2",
    "--ntasks-per-node": "1",
    "--gres": "gpu:1",
    "--cpus-per-task": "2",
    "--time": "01:00:00",
}
_FIELDS = {
    "--account": "Account",
    "--partition": "Partition",
    "--nodes": "NumNodes",
    "--cpus-per-task": "CPUs/Task",
    "--time": "TimeLimit",
}
_MEMORY = {"--mem": "MinMemoryNode", "--mem-per-cpu": "MinMemoryCPU"}
_PLAIN = re.compile(r"[\w.,:/=+@%-]+")


def meaning_of_end(state: str, exit_code: str) -> str:
    """Why a job ended, from the accounting's State and ExitCode; "" where they say nothing more."""
    word = state.partition(" ")[0]  # CANCELLED by 1000
    if word in _STATES:
        return _STATES[word]
    code, _, number = exit_code.partition(":")
    if not (code.isdecimal() and number.isdecimal() and len(code) < 4 and len(number) < 4):
        return ""
    # A shell tells the signal that ended its command as 128 and its number.
    told = int(number) or (int(code) - 128 if 128 < int(code) < 128 + 65 else 0)
    if told and int(code) not in _CODES:
        return f"ended by {_SIGNALS.get(told, f'signal {told}')}"
    return _CODES.get(int(code), "") if int(code) else ""


def sbatch_options(record: Mapping[str, str]) -> list[str]:
    """The options with which sbatch asks for what the job of this record was given.

    Those that launch/submit.sbatch asks for by itself are left out, and so is what the record does
    not tell for certain: constraints, reservations, dependencies.
    """
    if not {"NumNodes", "TimeLimit"} <= record.keys():
        return []
    told = {option: record[key] for option, key in _FIELDS.items() if key in record}
    if (per_node := record.get("NtasksPerN:B:S:C", "0").partition(":")[0]) not in {"0", "*"}:
        told["--ntasks-per-node"] = per_node
    told["--gres"] = _without_kind(record.get("TresPerNode", "")) or "none"
    for option, key in (("--gpus", "TresPerJob"), ("--gpus-per-task", "TresPerTask")):
        if (asked := _without_kind(record.get(key, ""))).startswith("gpu"):
            told[option] = asked.removeprefix("gpu:")
    told |= {option: record[key] for option, key in _MEMORY.items() if record.get(key, "0") != "0"}
    if record.get("QOS", "normal") != "normal":
        told["--qos"] = record["QOS"]
    return [
        f"{option}={value}"
        for option, value in told.items()
        if value != _DEFAULTS.get(option) and _PLAIN.fullmatch(value)
    ]


def _without_kind(resources: str) -> str:
    """`gpu:1` of `gres:gpu:1`, or of `gres/gpu:1`, as newer versions write it."""
    return ",".join(
        part.removeprefix("gres:").removeprefix("gres/") for part in resources.split(",")
    )
