"""Runs one prepared step on this stage: tensors in, tensors out. No asyncio, no communication.

Runs in the stage's compute thread, one step at a time, in the order of the head's messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mpipipe.kv_cache.layout import build_layout
from mpipipe.stage.sampler import sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.clock import Clock
    from mpipipe.control_plane.messages import StepScheduled
    from mpipipe.kv_cache.base import KVCache
    from mpipipe.kv_cache.layout import SequenceLens
    from mpipipe.models.adapter import StageModel
    from mpipipe.stage.sampler import SampleRow
    from mpipipe.types import TokenLogprobs

__all__ = ["PreparedStep", "StageExecutor", "StepOutput"]


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step message turned into this stage's plain inputs, before any tensor exists."""

    message: StepScheduled
    placed: Sequence[tuple[SequenceLens, list[int]]]  # spans with their page tables
    input_ids: Sequence[int]  # T ids on the first stage, empty elsewhere
    sample_rows: Sequence[SampleRow]  # on the last stage, empty elsewhere
    forget: Sequence[int]  # sequences closed since the step before


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a stage makes of a step: hidden states, or on the last stage ids."""

    tensor: torch.Tensor  # hidden [T, hidden], or ids [S] int64
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    compute_s: float = 0.0  # time in this thread


class StageExecutor:
    """One stage's model and cache, ready to compute.

    Args:
        model: the stage's layers, loaded and bound to `cache`.
        cache: the stage's KV cache.
        page_size: tokens per KV page.
        is_last: the stage that samples.
        clock: monotonic seconds; measures the compute alone.
    """

    def __init__(
        self,
        model: StageModel,
        cache: KVCache,
        *,
        page_size: int,
        is_last: bool,
        clock: Clock,
    ) -> None:
        self._model = model
        self._cache = cache
        self._page_size = page_size
        self._is_last = is_last
        self._clock = clock

    def run(self, step: PreparedStep, hidden_TH: torch.Tensor | None) -> StepOutput:
        """Compute `step`; `hidden_TH` is the previous stage's output, None on the first stage.

        Raises:
            NumericsError: the sampler met logits that are no numbers.
        """
        started_s = self._clock.now_s()
        for sequence_id in step.forget:
            self._cache.forget(sequence_id)
        with torch.inference_mode():
            tensor, logprobs = self._compute(step, hidden_TH)
        return StepOutput(tensor, logprobs, self._clock.now_s() - started_s)

    def _compute(
        self, step: PreparedStep, hidden_TH: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[TokenLogprobs | None, ...] | None]:
        layout = build_layout(
            step.placed, self._page_size, rotary_by_length=self._model.rotary_by_length
        )
        inputs = hidden_TH
        if inputs is None:
            inputs = torch.tensor(step.input_ids, dtype=torch.int64)
        if not self._is_last:
            return self._model.forward(inputs, layout, None), None
        # A step of prompt chunks only samples nothing: its layers run for their keys and values.
        logits_SV = self._model.forward(inputs, layout, _last_rows(step))
        sampled = sample(logits_SV, step.sample_rows)
        return sampled.token_ids_S, sampled.logprobs


def _last_rows(step: PreparedStep) -> torch.Tensor:
    """Rows of T whose logits are wanted: the last row of each sampled sequence, int64 [S]."""
    rows = [
        span.query_start + span.query_len - 1
        for (span, _), scheduled in zip(step.placed, step.message.sequences, strict=True)
        if scheduled.sample
    ]
    return torch.tensor(rows, dtype=torch.int64)
