"""`AheadEngine`: adds steps to this stage's lane. No asyncio, no communication, no waiting.

Every step is [inputs are there → compute → outputs are there] in the order of the lane; the worker
puts the transfers around it. Prompt chunks run as they are, ragged; decode steps are replayed as
CUDA graphs where the attention backend works from device tensors alone, and run ragged otherwise
(`needs_seq_lens`): slower, but for every backend, and the oracle of the graphs.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch

from mpipipe.control_plane.messages import DecodeScheduled
from mpipipe.kv_cache.layout import BatchLayout, SequenceLens, build_layout, to_device
from mpipipe.sampling_options import SamplingNeeds
from mpipipe.stage.decode_program import (
    GREEDY,
    DecodePrograms,
    ProgramKey,
    StageTensors,
    row_buckets,
)
from mpipipe.stage.device_logprobs import select_logprobs
from mpipipe.stage.device_sampler import SamplingColumns, sample_on_device
from mpipipe.stage.ids_intake import IdsIntake, RowSlices
from mpipipe.stage.launched import LaunchedStep, LogprobTensors
from mpipipe.stage.prefill import full_decode, full_prefill, sampled_rows
from mpipipe.stage.seats import SeatTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.control_plane.messages import RequestOpened, ScheduledSequence, StepScheduled
    from mpipipe.models.adapter import StageModel
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.planning.sampling_use import SamplingUse
    from mpipipe.stage.decode_batch import DecodeBatch
    from mpipipe.stage.lane import Lane

__all__ = ["AheadEngine"]


class AheadEngine:
    """One stage's tables, batches and programs; made by `assembly.open_engine`."""

    def __init__(
        self,
        plan: PipelinePlan,
        model: StageModel,
        lane: Lane,
        *,
        seats: SeatTable,
        batches: tuple[DecodeBatch, ...],
        tensors: StageTensors,
        programs: DecodePrograms,
        ragged: bool,
    ) -> None:
        self.seats = seats
        self.programs = programs
        self._plan = plan
        self._model = model
        self._lane = lane
        self._batches = batches
        self._tensors = tensors
        self._ragged = ragged
        # Steps take their input from whatever tensor it is in, so it may arrive while others run.
        self.free_inputs = ragged and lane.device.type == "cpu"
        self._slices = RowSlices()
        self._intake = IdsIntake(
            tensors.last_token,
            max_rows=plan.max_sequences_per_slot,
            lane=lane,
            fixed=programs.use_graphs,
        )
        self._buckets = row_buckets(plan.max_sequences_per_slot)
        self._is_last = model.plan.has_head
        self._is_first = model.plan.has_embedding

    # ---- sequences -------------------------------------------------------------------------------

    def open(self, message: RequestOpened) -> None:
        """A sequence begins, or begins again."""
        seat = self.seats.open(message)
        if self._is_last:
            self._tensors.history.open(
                seat, message.prompt_ids, message.num_output_tokens, message.sampling.needs
            )

    def close(self, sequence_ids: Sequence[int]) -> None:
        """Forget finished sequences."""
        for seat in self.seats.close(sequence_ids):
            self._tensors.cache.forget(seat)

    def clear(self) -> None:
        """The end of a generate call: forget all sequences."""
        for batch in self._batches:
            batch.clear()
        self.close(self.seats.open_ids())

    def needed_sample(self, step: DecodeScheduled) -> int:
        """The latest step whose ids must be in `last_token` before `step` runs; -1: none."""
        return self._batches[step.slot].latest_sample(step.joined)

    # ---- boot ------------------------------------------------------------------------------------

    def prepare(self, use: SamplingUse) -> None:
        """Run and capture the decode programs of every slot and size, the largest first.

        `use`: by the run's requests, as far as they are known. What no program made here can do is
        captured when it first occurs. First comes a prefill step of full size (without programs a
        decode step, too), so that no request pays for loading kernels, and too little memory shows
        before the first prompt. A CPU has no kernels to load and no memory to reserve.
        """
        if self.free_inputs:
            return
        with torch.inference_mode():
            self._prefill_trial()
            if self._ragged:
                self._decode_trial()
                self._lane.drain()
                return
        kinds = use.kinds if self._is_last else ((GREEDY, False),)
        if self._is_last:
            self._tensors.history.make(use.needs)
        keys = [
            ProgramKey(slot, rows, needs, with_logits)
            for rows in reversed(self._buckets)
            for needs, with_logits in kinds
            for slot in range(len(self._batches))
        ]
        with torch.inference_mode():
            self.programs.prepare(keys)
            # The small steps between the programs load their kernels, and are captured, here too.
            ids_S = self._lane.upload(np.zeros(1, dtype=np.int64))
            self.take_ids(self._lane.upload(np.full(1, self.seats.num_seats)), ids_S)
            if self._is_first and not self._is_last:
                for rows, batch in itertools.product(self._buckets, self._batches):
                    self.take_ids(self._seats_of(batch, rows), self.ids_buffer(rows))
            self._lane.download(ids_S)
        self._lane.drain()
        self.clear()

    def _prefill_trial(self) -> None:
        """A step of as many prompt tokens as a step may have; no step reads what it writes."""
        spans, pages = full_prefill(self._plan)
        layout = self._on_device([(span, pages) for span in spans])
        rows_S = torch.arange(len(spans), device=self._lane.device) if self._is_last else None
        self._model.forward(self._trial_inputs(layout), layout, rows_S)

    def _decode_trial(self) -> None:
        """As `_prefill_trial`, of as many decodes, over as much cache, as a step may have."""
        spans, pages = full_decode(self._plan)
        layout = self._on_device([(span, pages) for span in spans])
        self._model.forward_decode(self._trial_inputs(layout), layout)

    def _trial_inputs(self, layout: BatchLayout) -> torch.Tensor:
        hidden_in_BH = self._tensors.hidden_in_BH
        if hidden_in_BH is None:
            return self._tensors.last_token.new_zeros(layout.num_tokens)
        return hidden_in_BH.new_zeros(layout.num_tokens, hidden_in_BH.shape[1])

    def _on_device(self, placed: Sequence[tuple[SequenceLens, Sequence[int]]]) -> BatchLayout:
        layout = build_layout(
            placed,
            self._plan.page_size_tokens,
            rotary_by_length=self._model.rotary_by_length,
        )
        if self.free_inputs:
            return layout
        lane = self._lane
        return to_device(layout, lane.device, lambda tensor: lane.upload(tensor.numpy()))

    # ---- steps -----------------------------------------------------------------------------------

    def hidden_buffer(self, step: StepScheduled | DecodeScheduled) -> torch.Tensor:
        """Where the step's hidden states must arrive: [T, hidden]."""
        buffer_BH = self._tensors.hidden_in_BH
        assert buffer_BH is not None, "the first stage receives none"
        if self.free_inputs:
            return buffer_BH.new_empty(step.num_tokens, self._plan.hidden_size)
        if isinstance(step, DecodeScheduled):
            return self._slices.of(buffer_BH, self._num_rows(step))
        num_tokens = step.num_tokens
        if num_tokens <= buffer_BH.shape[0]:
            return buffer_BH[:num_tokens]
        shape = (num_tokens, self._plan.hidden_size)
        return torch.empty(shape, dtype=buffer_BH.dtype, device=buffer_BH.device)

    @torch.inference_mode()
    def prefill(self, step: StepScheduled, hidden_TH: torch.Tensor | None) -> LaunchedStep:
        """Add a step of prompt chunks."""
        return self._chunks_behind(None, step.step, step.sequences, hidden_TH)

    @torch.inference_mode()
    def decode(self, step: DecodeScheduled, hidden_BH: torch.Tensor | None) -> LaunchedStep:
        """Add one round of a slot's batch. `hidden_BH`: the filled `hidden_buffer`, if any.

        The result has all rows of the program, those without a sequence included.
        """
        batch = self._batches[step.slot]
        batch.apply(step)
        if step.chunks:
            assert self._ragged, "programs hold decodes only"
            return self._chunks_behind(batch, step.step, step.chunks, hidden_BH)
        if self._ragged:
            return self._decode_ragged(batch, hidden_BH)
        rows = self._num_rows(step)
        needs = batch.needs if self._is_last else GREEDY
        with_logits = self._is_last and batch.max_logprobs >= 0
        output = self.programs.run(ProgramKey(step.slot, rows, needs, with_logits))
        num_rows = step.num_rows
        logprobs = None
        if output.logits_BV is not None:
            logits_SV, ids_S = output.logits_BV[:num_rows], output.result[:num_rows]
            logprobs = self._logprobs(logits_SV, ids_S, batch.seats_of_rows)
        return LaunchedStep(output.result, self._seats_of(batch, rows), logprobs)

    def _num_rows(self, step: DecodeScheduled) -> int:
        """Rows that are computed and sent; every stage comes to the same number."""
        if self._ragged:
            return step.num_rows
        return next(size for size in self._buckets if size >= step.num_rows)

    def _seats_of(self, batch: DecodeBatch, num_rows: int) -> torch.Tensor:
        return self._slices.of(batch.device["seats"], num_rows)

    def _decode_ragged(self, batch: DecodeBatch, hidden_BH: torch.Tensor | None) -> LaunchedStep:
        """A decode step from lengths that the host knows; tokens still come from the device."""
        layout = self._on_device(self._decode_spans(batch))
        seats_S = batch.device["seats"][: len(batch)]
        inputs = self._latest_ids(batch) if hidden_BH is None else hidden_BH
        result = self._model.forward_decode(inputs, layout)
        if not self._is_last:
            return LaunchedStep(result, seats_S)
        columns, positions_S = batch.columns(len(batch)), layout.kv_lens_B.long()
        return self._sample(result, batch.seats_of_rows, positions_S, columns, batch.needs)

    def _chunks_behind(
        self,
        batch: DecodeBatch | None,
        number: int,
        chunks: Sequence[ScheduledSequence],
        hidden_TH: torch.Tensor | None,
    ) -> LaunchedStep:
        """A step of prompt chunks, behind a token of each of `batch`'s sequences, if there are."""
        spans = [] if batch is None else self._decode_spans(batch)
        first_row = len(spans)
        layout = self._on_device(spans + self.seats.place(chunks, number, first_row))
        inputs = hidden_TH
        if inputs is None:
            inputs = self._lane.upload(self.seats.input_ids(chunks))
            if batch is not None:
                inputs = torch.cat((self._latest_ids(batch), inputs))
        seats = self.seats.sampled_seats(chunks)
        rows, positions = sampled_rows(chunks, first_row), self.seats.num_computed[seats]
        if batch is not None:
            seats = np.concatenate((batch.seats_of_rows, seats))
            rows = np.concatenate((np.arange(first_row), rows))
            positions = np.concatenate((batch.lengths, positions))
        seats_S = self._lane.upload(seats)
        if not self._is_last:
            return LaunchedStep(self._model.forward(inputs, layout, None), seats_S)
        logits_SV = self._model.forward(inputs, layout, self._lane.upload(rows))
        if not len(seats):
            # For the first stage to see that the step is done.
            return LaunchedStep(seats_S.new_zeros(1), seats_S)
        positions_S = self._lane.upload(positions.astype(np.int64))
        columns, needs = self._settings(seats, seats_S)
        return self._sample(logits_SV, seats, positions_S, columns, needs)

    def _decode_spans(self, batch: DecodeBatch) -> list[tuple[SequenceLens, Sequence[int]]]:
        """Where the rows of a batch lie in a step, and their page tables."""
        rows = zip(batch.seats_of_rows.tolist(), batch.lengths.tolist(), strict=True)
        return [
            (SequenceLens(seat, row, 1, length), self.seats.pages[seat])
            for row, (seat, length) in enumerate(rows)
        ]

    def _latest_ids(self, batch: DecodeBatch) -> torch.Tensor:
        """What the rows of a batch sampled last; -1, logits that were not finite, is read as 0."""
        seats_S = batch.device["seats"][: len(batch)]
        return self._tensors.last_token.index_select(0, seats_S).clamp_(min=0)

    # ---- sampling --------------------------------------------------------------------------------

    def _settings(
        self, seats: np.ndarray, seats_S: torch.Tensor
    ) -> tuple[SamplingColumns, SamplingNeeds]:
        """How the sequences of a prefill step sample."""
        needs = self.seats.needs_of(seats)
        columns = SamplingColumns(
            {name: self._lane.upload(column[seats]) for name, column in self.seats.columns.items()},
            seats_S,
        )
        return columns, needs

    def _sample(
        self,
        logits_SV: torch.Tensor,
        seats: np.ndarray,
        positions_S: torch.Tensor,
        columns: SamplingColumns,
        needs: SamplingNeeds,
    ) -> LaunchedStep:
        """Draw a token per row, outside of a graph."""
        seats_S, history = columns.seats_S, self._tensors.history
        ids_S = sample_on_device(logits_SV, columns, positions_S, needs, history)
        history.add(needs, seats_S, ids_S)
        if self._is_first:
            self.take_ids(seats_S, ids_S)
        return LaunchedStep(ids_S, seats_S, self._logprobs(logits_SV, ids_S, seats))

    def input_buffers(self) -> list[torch.Tensor]:
        """Where the inputs of decode steps arrive: of each size, hidden states, or ids."""
        hidden_in_BH = self._tensors.hidden_in_BH
        if hidden_in_BH is None:
            return [self.ids_buffer(rows) for rows in self._buckets]
        return [self._slices.of(hidden_in_BH, rows) for rows in self._buckets]

    def ids_buffer(self, num_rows: int) -> torch.Tensor:
        """Where the ids of a decode step arrive: int64 [num_rows] (first stage)."""
        return self._intake.buffer(num_rows)

    def take_ids(self, seats_S: torch.Tensor, ids_S: torch.Tensor) -> None:
        """The tokens that sequences sampled, for the next step's input (first stage)."""
        self._intake.take(seats_S, ids_S)

    def _logprobs(
        self, logits_SV: torch.Tensor, ids_S: torch.Tensor, seats: np.ndarray
    ) -> LogprobTensors | None:
        num_top: list[int] = self.seats.num_logprobs[seats].tolist()
        if max(num_top) < 0:
            return None
        selected = select_logprobs(logits_SV, ids_S, max(num_top))
        host = [self._lane.download(tensor) for tensor in (ids_S, *selected)]
        return LogprobTensors(host[0], host[1], host[2], host[3], tuple(num_top))
