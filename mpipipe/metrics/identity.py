"""Whose line it is: the fields that every line of a run's JSONL files begins with.

The head makes the run's id at the first attempt; later attempts in the same folder keep it.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from dataclasses import dataclass
from typing import Any, TypeGuard

__all__ = ["SCHEMA", "RunIdentity", "is_run_id", "new_run_id"]

SCHEMA = 1  # of the files of a run: within it fields are added, never renamed
_RUN_ID = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """One rank in one attempt of a run."""

    run: str  # 12 hex digits
    attempt: int  # 1, 2, …
    job: str | None  # the label of the Slurm job; None: in no job
    replica: int
    rank: int
    stage: int

    def fields(self) -> dict[str, Any]:
        """The fields of a line, in their order."""
        return dataclasses.asdict(self)


def new_run_id() -> str:
    """An id that no other run has."""
    return secrets.token_hex(6)


def is_run_id(value: object) -> TypeGuard[str]:
    """Whether `value`, out of a file, is an id as `new_run_id` makes them."""
    return isinstance(value, str) and _RUN_ID.fullmatch(value) is not None
