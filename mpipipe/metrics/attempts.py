"""What each start of a run did, and all of them together. Pure.

An attempt that ended in order tells it in `metrics.json`; what one did that was killed is recovered
by `run_folder.history`. A prompt counts for the attempt that has completed it, so once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

__all__ = ["DONE", "INTERRUPTED", "STOPPED", "AttemptState", "AttemptTotals", "total_of"]

AttemptState = Literal["done", "stopped", "interrupted"]
DONE: Final = "done"  # nothing was left to do
STOPPED: Final = "stopped"  # told to stop, its files whole
INTERRUPTED: Final = "interrupted"  # killed, or ended by an error


@dataclass(frozen=True, slots=True)
class AttemptTotals:
    """One start of a run."""

    attempt: int  # from 1
    state: AttemptState
    wall_s: float = 0.0  # from the start of the head's process; interrupted: to its last sign
    generate_s: float = 0.0
    num_completed: int = 0
    num_failed: int = 0  # prompts that became error records
    num_output_tokens: int = 0  # of completed prompts

    @staticmethod
    def from_plain(entry: object) -> AttemptTotals | None:
        """Out of a file; None: it is not all there, or is no such thing."""
        if not isinstance(entry, Mapping) or entry.get("state") not in (DONE, STOPPED, INTERRUPTED):
            return None
        counts = [_count(entry.get(name)) for name in _COUNTS]
        seconds = [_seconds(entry.get(name)) for name in _SECONDS]
        if None in counts or None in seconds:
            return None
        named: dict[str, Any] = dict(zip((*_COUNTS, *_SECONDS), (*counts, *seconds), strict=True))
        return AttemptTotals(state=entry["state"], **named)


_COUNTS = ("attempt", "num_completed", "num_failed", "num_output_tokens")
_SECONDS = ("wall_s", "generate_s")


_MOST = 10**15  # of anything that a run counts; what a file says may be of any size


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= _MOST else None


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= _MOST else None


def total_of(attempts: Iterable[AttemptTotals]) -> dict[str, Any]:
    """The sums over attempts, as `metrics.json` has them under `total`."""
    told = list(attempts)
    names = [field.name for field in dataclasses.fields(AttemptTotals)[2:]]
    total = {name: sum(getattr(attempt, name) for attempt in told) for name in names}
    # Of an attempt that was killed, the log may not say when it began to generate (log.level).
    is_known = all(attempt.generate_s > 0 for attempt in told if attempt.num_output_tokens)
    generate_s = total["generate_s"]
    tokens_per_s: float | None = 0.0
    if generate_s > 0:
        tokens_per_s = total["num_output_tokens"] / generate_s if is_known else None
    return {"num_attempts": len(told), **total, "output_tokens_per_s": tokens_per_s}
