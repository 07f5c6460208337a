"""What drafts were good for: counts of a run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DraftUse"]


@dataclass(frozen=True, slots=True)
class DraftUse:
    """Tokens that were drafted by n-gram lookup, and what came of it."""

    num_drafted: int = 0  # tokens that steps have verified
    num_accepted: int = 0  # of these, those that completions have
    num_saved_steps: int = 0  # decode steps that would have been needed for the latter

    def __add__(self, other: DraftUse) -> DraftUse:
        return DraftUse(
            self.num_drafted + other.num_drafted,
            self.num_accepted + other.num_accepted,
            self.num_saved_steps + other.num_saved_steps,
        )
