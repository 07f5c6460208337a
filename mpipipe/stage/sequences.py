"""`SequenceTable`: what a stage remembers of each sequence, and how a step message becomes input.

The head decides; this table only follows its messages, in order. Histories are kept on the first
stage (which looks tokens up) and on the last (whose penalties need them).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mpipipe.kv_cache.layout import SequenceLens
from mpipipe.sampling_options import SamplingNeeds
from mpipipe.stage.sampler import SampleRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.control_plane.messages import RequestOpened, StepScheduled
    from mpipipe.types import SamplingParams

__all__ = ["SequenceTable", "StagedSequence"]


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
