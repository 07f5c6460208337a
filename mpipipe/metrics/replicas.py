"""What each replica of a run did: figures of one call of `generate`, made on rank 0. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["ReplicaTotals"]


@dataclass(frozen=True, slots=True)
class ReplicaTotals:
    """One replica in one call of `generate`, as rank 0 was told. Seconds and counts."""

    replica: int
    head_rank: int
    num_completed: int
    num_failed: int
    num_prompt_tokens: int  # of completed prompts, as are the output tokens
    num_output_tokens: int
    num_preemptions: int
    generate_s: float  # the whole call, the same for all replicas
    starved_s: float  # it had no request while requests might still come: 0 is perfect
    tail_s: float  # it was done, and others were not

    @property
    def output_tokens_per_s(self) -> float:
        """Over the whole call."""
        return self.num_output_tokens / self.generate_s if self.generate_s > 0 else 0.0

    @property
    def idle_ratio(self) -> float | None:
        """Share of the call in which it had no request; None without a call."""
        return (self.starved_s + self.tail_s) / self.generate_s if self.generate_s > 0 else None

    def fields(self) -> dict[str, Any]:
        """As in `metrics.json`."""
        return {
            **dataclasses.asdict(self),
            "output_tokens_per_s": self.output_tokens_per_s,
            "idle_ratio": self.idle_ratio,
        }
