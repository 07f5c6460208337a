"""What the engine works out about steps of prompt chunks, without any tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpipipe.kv_cache.layout import SequenceSpan

if TYPE_CHECKING:
    from mpipipe.control_plane.messages import StepScheduled
    from mpipipe.planning.plan import PipelinePlan

__all__ = ["full_prefill", "sampled_rows"]


def full_prefill(plan: PipelinePlan) -> tuple[list[SequenceSpan], range]:
    """Prompts that fill a step to `max_tokens_per_step`, and pages enough for each of them."""
    spans: list[SequenceSpan] = []
    first = 0
    longest = min(plan.max_sequence_tokens, plan.num_kv_pages * plan.page_size_tokens)
    while first < plan.max_tokens_per_step:
        length = min(longest, plan.max_tokens_per_step - first)
        spans.append(SequenceSpan(len(spans), first, length, length))
        first += length
    return spans, range(-(-longest // plan.page_size_tokens))


def sampled_rows(spans: tuple[SequenceSpan, ...], step: StepScheduled) -> np.ndarray:
    """The last row of each chunk that samples: int64 [S]."""
    rows = [
        span.query_start + span.query_len - 1
        for span, scheduled in zip(spans, step.sequences, strict=True)
        if scheduled.sample
    ]
    return np.array(rows, dtype=np.int64)
