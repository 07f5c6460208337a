"""What a run did not have to compute, in words: tokens of shared prefixes, steps saved by drafts.

The closing text, `mpipipe status`, `mpipipe logs summary` and the report say it alike. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from mpipipe.metrics.drafts import DraftUse

__all__ = ["SparedWork"]


@dataclass(frozen=True, slots=True)
class SparedWork:
    """Counts of a run; all zero where no prompts begin alike and nothing is drafted."""

    num_shared_tokens: int = 0  # of prompts, not computed: other prompts begin in the same way
    drafts: DraftUse = field(default_factory=DraftUse)  # by n-gram lookup
    num_output_tokens: int = 0  # 0: not known

    @classmethod
    def of_run(
        cls,
        num_shared_tokens: int,
        drafts: DraftUse,
        *,
        num_output_tokens: int,
        num_unfinished: int,
    ) -> Self:
        """Of a run that has ended: `num_output_tokens` are those of the prompts it has completed.

        Drafts count for all prompts, so with unfinished ones nothing follows from the two.
        """
        return cls(num_shared_tokens, drafts, 0 if num_unfinished else num_output_tokens)

    @property
    def tokens_per_step(self) -> float | None:
        """Output tokens of a sequence per step that gave it any; None: no such step is known.

        Without drafts each of these steps gives one token; a step with a draft gives one more for
        each drafted token that is accepted.
        """
        num_steps = self.num_output_tokens - self.drafts.num_accepted
        return self.num_output_tokens / num_steps if num_steps > 0 else None

    def words(self) -> dict[str, tuple[str, ...]]:
        """By label; empty where nothing was spared and nothing drafted."""
        told: dict[str, tuple[str, ...]] = {}
        if self.num_shared_tokens:
            told["shared"] = (f"{self.num_shared_tokens:,} prompt tokens not computed",)
        if self.drafts.num_drafted:
            told["drafts"] = self._draft_words()
        return told

    def _draft_words(self) -> tuple[str, ...]:
        use, tokens_per_step = self.drafts, self.tokens_per_step
        share = min(1.0, use.num_accepted / use.num_drafted)
        return (
            f"{use.num_accepted:,} of {use.num_drafted:,} tokens accepted ({share:.0%})",
            *([f"{tokens_per_step:.2f} tokens a step"] if tokens_per_step is not None else []),
            *([f"{use.num_saved_steps:,} decode steps saved"] if use.num_saved_steps else []),
        )
