"""The oracle of a stage: every sequence's history on the host, every step laid out anew.

`StageExecutor` turns one prepared step into tensors; `SequenceTable` prepares steps from messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mpipipe.kv_cache.layout import SequenceLens, build_layout
from mpipipe.sampling_options import SamplingNeeds
from tests.oracles.sampler import SampleRow, sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.clock import Clock
    from mpipipe.control_plane.messages import RequestOpened, StepScheduled
    from mpipipe.kv_cache.base import KVCache
    from mpipipe.models.adapter import StageModel
    from mpipipe.types import SamplingParams, TokenLogprobs

__all__ = ["PreparedStep", "SequenceTable", "StageExecutor", "StagedSequence", "StepOutput"]


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


@dataclass(slots=True)
class StagedSequence:
    """One open sequence on this stage."""

    sampling: SamplingParams
    token_ids: list[int]  # prompt, then every sampled token
    rotary_len: int  # as in `RequestOpened`
    num_prompt_tokens: int
    needs: SamplingNeeds
    pages: list[int] = field(default_factory=list)


class SequenceTable:
    """The open sequences of one stage, by id."""

    def __init__(self) -> None:
        self._sequences: dict[int, StagedSequence] = {}

    def open(self, message: RequestOpened) -> None:
        """Remember the fixed facts of a sequence."""
        self._sequences[message.sequence_id] = StagedSequence(
            sampling=message.sampling,
            token_ids=list(message.prompt_ids),
            rotary_len=message.rotary_len,
            num_prompt_tokens=len(message.prompt_ids) - message.num_output_tokens,
            needs=message.sampling.needs,
        )

    def close(self, sequence_ids: Sequence[int]) -> None:
        """Forget finished sequences."""
        for sequence_id in sequence_ids:
            self._sequences.pop(sequence_id, None)

    def clear(self) -> tuple[int, ...]:
        """Forget all sequences (the end of a generate call); return their ids."""
        sequence_ids = tuple(self._sequences)
        self._sequences.clear()
        return sequence_ids

    def __len__(self) -> int:
        return len(self._sequences)

    def place(self, step: StepScheduled) -> list[tuple[SequenceLens, list[int]]]:
        """Apply the step's page deltas; return each sequence's span and its whole page table.

        The pages are copies: the table may change while the step waits to run.
        """
        placed: list[tuple[SequenceLens, list[int]]] = []
        start = 0
        for scheduled in step.sequences:
            sequence = self._sequences[scheduled.sequence_id]
            if scheduled.num_computed == 0:
                sequence.pages = []
            sequence.pages.extend(scheduled.new_pages)
            span = SequenceLens(
                sequence_id=scheduled.sequence_id,
                query_start=start,
                query_len=scheduled.num_tokens,
                kv_len=scheduled.num_computed + scheduled.num_tokens,
                rotary_len=sequence.rotary_len,
            )
            placed.append((span, list(sequence.pages)))
            start += scheduled.num_tokens
        return placed

    def input_ids(self, step: StepScheduled) -> list[int]:
        """The T token ids that the step computes (first stage)."""
        ids: list[int] = []
        for scheduled in step.sequences:
            history = self._sequences[scheduled.sequence_id].token_ids
            end = scheduled.num_computed + scheduled.num_tokens
            assert end <= len(history), "the head scheduled tokens that stage 0 does not know yet"
            ids.extend(history[scheduled.num_computed : end])
        return ids

    def sample_rows(self, step: StepScheduled) -> list[SampleRow]:
        """Settings of the sequences that sample in this step, in order (last stage)."""
        rows: list[SampleRow] = []
        for scheduled in step.sequences:
            if not scheduled.sample:
                continue
            sequence = self._sequences[scheduled.sequence_id]
            ids = tuple(sequence.token_ids) if sequence.needs & SamplingNeeds.HISTORY else ()
            rows.append(
                SampleRow(
                    sampling=sequence.sampling,
                    position=scheduled.num_computed + scheduled.num_tokens,
                    seen_ids=ids,
                    output_ids=ids[sequence.num_prompt_tokens :],
                )
            )
        return rows

    def append_sampled(self, step: StepScheduled, token_ids: Sequence[int]) -> None:
        """Extend the histories of the sequences that sampled in `step`."""
        sampled = [scheduled for scheduled in step.sequences if scheduled.sample]
        assert len(sampled) == len(token_ids), "one id per sampled sequence"
        for scheduled, token_id in zip(sampled, token_ids, strict=True):
            sequence = self._sequences.get(scheduled.sequence_id)
            if sequence is not None:
                sequence.token_ids.append(token_id)
