"""How a launch ended, from its exit code and what the run said of its end. Pure.

A launch that fails is a result as well: the largest batch that fits is found by one that does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpipipe.errors import (
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PEER_LOST,
    EXIT_PROMPTS,
    EXIT_REQUEUE,
    is_out_of_memory,
)
from mpipipe.experiments.record import Outcome

__all__ = ["Ending", "judge_ending", "was_stopped"]

_MOST_TEXT = 400  # of a reason
# How errors.MpipipeError and planning say that memory does not do.
_SHORT_OF_MEMORY = ("memory ran out", "out of memory")
_KILLED = {137, 9, -9}  # by SIGKILL: as a shell, srun and Python tell it


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known of the end of a launch."""

    exit_code: int | None  # None: ended at the time limit
    limit_s: float
    error: str = ""  # that ended the run, as its status or log says
    kind: str = ""  # the class of that error; empty: not known
    last_line: str = ""  # that the launch printed
    has_metrics: bool = False
    has_tokens: bool = False  # every line of its completions has them
    has_speed: bool = False  # output tokens per second are known, and not 0
    num_failed: int = 0  # prompts that became error records


def was_stopped(exit_code: int | None) -> bool:
    """Whether the launch was told to stop: no result, it is to be run again."""
    return exit_code in {EXIT_REQUEUE, EXIT_INTERRUPTED}


def judge_ending(ending: Ending) -> tuple[Outcome, str]:
    """The outcome, and why in one sentence; no reason where all is well."""
    if ending.exit_code is None:
        return "timeout", f"it did not end within {ending.limit_s:g} s (--timeout)"
    if ending.exit_code == EXIT_OK:
        missing = _missing(ending)
        return ("failed", f"it ended without {missing}") if missing else ("ok", "")
    said = ending.error or ending.last_line
    if _is_short_of_memory(said, ending.kind):
        return "out_of_memory", _short(said)
    if ending.exit_code == EXIT_CONFIG and ending.kind in {"", "PlanError"} and ending.error:
        return "infeasible", _short(said)
    return "failed", _short(_failure(ending, said))


def _missing(ending: Ending) -> str:
    """Which evidence of its success a launch has not left; empty: none."""
    if not ending.has_metrics:
        return "metrics.json"
    if not ending.has_tokens:
        return "completions of all prompts (completions.jsonl)"
    return "" if ending.has_speed else "throughput (output_tokens_per_s in metrics.json)"


def _is_short_of_memory(said: str, kind: str) -> bool:
    lower = said.lower()
    return (
        kind in {"MemoryError", "OutOfMemoryError"}
        or any(words in lower for words in _SHORT_OF_MEMORY)
        or is_out_of_memory(RuntimeError(said))
    )


_MEANINGS: Mapping[int, str] = {
    EXIT_CONFIG: "configuration, plan or output folder",
    EXIT_CHECKPOINT: "model folder",
    EXIT_ENVIRONMENT: "MPI, ranks, memory or devices",
    EXIT_PEER_LOST: "a rank was lost",
}


def _failure(ending: Ending, said: str) -> str:
    code = ending.exit_code
    assert code is not None, "a launch at its time limit is no failure"
    if code == EXIT_PROMPTS:
        return f"{ending.num_failed} prompts became error records"
    meaning = _MEANINGS.get(code, f"exit code {code}")
    if code in _KILLED:
        meaning = "a rank was killed (SIGKILL, often for lack of memory)"
    return f"{meaning}: {said}" if said else meaning


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_TEXT else f"{line[: _MOST_TEXT - 3]}..."
