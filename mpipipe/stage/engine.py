"""`StageEngine`: adds steps to this stage's stream. No asyncio, no communication, no waiting.

Every step is [inputs are there → compute → outputs are there] in the order of the stream; the
worker puts the transfers around it. Prompt chunks run as they are, at their lengths (varlen);
decode steps without them are replayed as CUDA graphs where the attention backend works from device
tensors alone, and run varlen otherwise (`needs_seq_lens`): slower, but for every backend, and the
oracle of the graphs.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch

from mpipipe.control_plane.messages import DecodeScheduled, PagesSaved
from mpipipe.kv_cache.layout import BatchLayout, SequenceLens, build_layout, to_device
from mpipipe.planning.step_limits import row_buckets
from mpipipe.sampling_options import SamplingNeeds
from mpipipe.stage.cuda_graph_runner import (
    GREEDY,
    CudaGraphRunner,
    GraphKey,
    StageTensors,
)
from mpipipe.stage.device_logprobs import select_logprobs
from mpipipe.stage.device_sampler import SamplingColumns, sample_on_device
from mpipipe.stage.launched import LaunchedStep, LogprobTensors
from mpipipe.stage.prefill import full_decode, full_prefill, sampled_rows
from mpipipe.stage.request_table import Placed, RequestTable
from mpipipe.stage.token_feedback import RowSlices, TokenFeedback

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpipipe.control_plane.messages import (
        PagesRestored,
        RequestOpened,
        ScheduledSequence,
        StepScheduled,
    )
    from mpipipe.metrics.offload import PageMoveUse
    from mpipipe.models.adapter import StageModel
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.planning.workload import SamplingUse
    from mpipipe.stage.decode_batch import DecodeBatch
    from mpipipe.stage.stream import Stream

__all__ = ["StageEngine"]


class StageEngine:
    """One stage's tables, batches and graphs; made by `assembly.open_engine`."""

    def __init__(
        self,
        plan: PipelinePlan,
        model: StageModel,
        stream: Stream,
        *,
        request_table: RequestTable,
        batches: tuple[DecodeBatch, ...],
        tensors: StageTensors,
        graph_runner: CudaGraphRunner,
        varlen: bool,
    ) -> None:
        self.request_table = request_table
        self.graph_runner = graph_runner
        self._plan = plan
        self._model = model
        self._stream = stream
        self._batches = batches
        self._tensors = tensors
        self._host_pages = tensors.host_pages
        self._varlen = varlen
        # Steps take their input from whatever tensor it is in, so it may arrive while others run.
        self.free_inputs = varlen and stream.device.type == "cpu"
        self._slices = RowSlices()
        self._feedback = TokenFeedback(
            tensors.last_token,
            max_rows=plan.max_decode_rows,
            stream=stream,
            fixed=graph_runner.use_graphs,
        )
        self._buckets = row_buckets(plan.max_decode_rows)
        self._is_last = model.plan.has_head
        self._is_first = model.plan.has_embedding

    # ---- sequences -------------------------------------------------------------------------------

    def open(self, message: RequestOpened) -> None:
        """A sequence begins, or begins again."""
        request_row = self.request_table.open(message)
        if self._is_last:
            self._tensors.history.open(
                request_row, message.prompt_ids, message.num_output_tokens, message.sampling.needs
            )

    def close(self, sequence_ids: Sequence[int]) -> None:
        """Forget finished sequences."""
        for request_row in self.request_table.close(sequence_ids):
            self._tensors.cache.forget(request_row)

    def clear(self) -> None:
        """The end of a generate call: forget all sequences."""
        if self._host_pages is not None:
            self._host_pages.finish()
        for batch in self._batches:
            batch.clear()
        self.close(self.request_table.open_ids())

    def needed_sample(self, step: DecodeScheduled) -> int:
        """The latest step whose ids must be in `last_token` before `step` runs; -1: none."""
        if step.verified:  # brings its own
            return -1
        return self._batches[step.slot].latest_sample(step.joined)

    # ---- pages in host memory --------------------------------------------------------------------

    @torch.inference_mode()
    def move_pages(self, message: PagesSaved | PagesRestored) -> None:
        """Add the copies to the stream of copies: behind all steps so far, before all to come."""
        assert self._host_pages is not None, "the plan has no pages in host memory"
        if isinstance(message, PagesSaved):
            self._host_pages.save(message.pages, message.host_pages)
            return
        num_found = len(message.pages) - len(message.host_pages)
        self._host_pages.restore(message.host_pages, message.pages[num_found:])
        self.request_table.restore(message)

    def page_moves(self) -> PageMoveUse | None:
        """What was moved so far; None: there are no pages in host memory."""
        return None if self._host_pages is None else self._host_pages.use()

    def _settle_pages(
        self,
        new_pages: Sequence[int],
        joined: Sequence[int],
        chunks: Sequence[ScheduledSequence],
    ) -> None:
        """Let the next step wait for copies of pages that it writes, or that it is the first to
        read.
        """
        if self._host_pages is None:
            return
        pages = [*new_pages]
        for chunk in chunks:
            pages += chunk.new_pages
        for sequence_id in (*joined, *(chunk.sequence_id for chunk in chunks)):
            pages += self.request_table.pages_of(sequence_id)
        self._host_pages.settle(pages)

    # ---- boot ------------------------------------------------------------------------------------

    def prepare(self, use: SamplingUse, *, capturing: Callable[[], object] = lambda: None) -> None:
        """Run and capture the decode graphs of every slot and size, the largest first.

        `use`: by the run's requests, as far as they are known. What no graph made here can do is
        captured when it first occurs. `capturing` is told when graphs begin. First comes a prefill
        step of full size (without graphs a decode step, too), so that no request pays for loading
        kernels, and too little memory shows before the first prompt. Where weights come from a disk
        that would take longer than it spares: only the largest decode step is run. A CPU has no
        kernels to load and no memory to reserve.
        """
        if self.free_inputs:
            return
        with torch.inference_mode():
            self._prefill_trial()
            if self._varlen:
                self._decode_trial()
                self._stream.drain()
                return
        kinds = use.kinds if self._is_last else ((GREEDY, False),)
        if self._is_last:
            self._tensors.history.make(use.needs)
        keys = [
            GraphKey(slot, rows, needs, with_logits, in_groups)
            for rows in reversed(self._buckets)
            for needs, with_logits in kinds
            for in_groups in (False, True)[: 1 + (self._plan.read_prefixes_once and rows > 1)]
            for slot in range(len(self._batches))
        ]
        if self._model.waits_on_host:  # for each of them all weights would come from the disk
            keys = [max(keys, key=lambda key: (key.num_rows, key.num_options))]
        if self.graph_runner.use_graphs:
            capturing()
        with torch.inference_mode():
            self.graph_runner.prepare(keys)
            # The small steps between the graphs load their kernels, and are captured, here too.
            ids_S = self._stream.upload(np.zeros(1, dtype=np.int64))
            self.take_ids(
                self._stream.upload(np.full(1, self.request_table.num_request_rows)), ids_S
            )
            if self._is_first and not self._is_last:
                for rows, batch in itertools.product(self._buckets, self._batches):
                    self.take_ids(self._request_rows_of(batch, rows), self.ids_buffer(rows))
            self._stream.download(ids_S)
        self._stream.drain()
        self.clear()

    def _prefill_trial(self) -> None:
        """A step of as many prompt tokens as a step may have; no step reads what it writes."""
        seq_lens, pages = full_prefill(self._plan)
        layout = self._on_device([(seq_len, pages) for seq_len in seq_lens])
        rows_S = torch.arange(len(seq_lens), device=self._stream.device) if self._is_last else None
        self._model.forward(self._trial_inputs(layout), layout, rows_S)

    def _decode_trial(self) -> None:
        """As `_prefill_trial`, of as many decodes, over as much cache, as a step may have."""
        seq_lens, pages = full_decode(self._plan)
        layout = self._on_device([(seq_len, pages) for seq_len in seq_lens])
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
        stream = self._stream
        return to_device(
            layout,
            lambda tensor: stream.upload(tensor.numpy()),
            max_kv_len=self._plan.max_sequence_tokens,
        )

    # ---- steps -----------------------------------------------------------------------------------

    def hidden_buffer(self, step: StepScheduled | DecodeScheduled) -> torch.Tensor:
        """Where the step's hidden states must arrive: [T, hidden]."""
        buffer_BH = self._tensors.hidden_in_BH
        assert buffer_BH is not None, "the first stage receives none"
        if self.free_inputs:
            return buffer_BH.new_empty(step.num_tokens, self._plan.hidden_size)
        if isinstance(step, DecodeScheduled) and not step.chunks:
            return self._slices.of(buffer_BH, self._num_rows(step))
        num_tokens = step.num_tokens
        if num_tokens <= buffer_BH.shape[0]:
            return buffer_BH[:num_tokens]
        shape = (num_tokens, self._plan.hidden_size)
        return torch.empty(shape, dtype=buffer_BH.dtype, device=buffer_BH.device)

    @torch.inference_mode()
    def prefill(self, step: StepScheduled, hidden_TH: torch.Tensor | None) -> LaunchedStep:
        """Add a step of prompt chunks."""
        self._settle_pages((), (), step.sequences)
        return self._chunks_behind(None, step.step, step.sequences, hidden_TH)

    @torch.inference_mode()
    def decode(self, step: DecodeScheduled, hidden_BH: torch.Tensor | None) -> LaunchedStep:
        """Add one round of a slot's batch. `hidden_BH`: the filled `hidden_buffer`, if any.

        The result has all rows of the graph, those without a sequence included.
        """
        batch = self._batches[step.slot]
        new_pages = step.new_pages
        for verified in step.verified:
            new_pages += verified.new_pages
        drafting = tuple([verified.sequence_id for verified in step.verified])
        self._settle_pages(new_pages, step.joined + drafting, step.chunks)
        drafted = batch.apply(step)
        if drafted and self._varlen:
            return self._verify_varlen(step, batch, drafted, hidden_BH)
        if drafted and self._is_first:
            rows_R = self._request_rows_of(batch, step.num_rows)
            self._tensors.last_token.index_copy_(0, rows_R, self._drafted_ids(step))
        if step.chunks:
            launched = self._chunks_behind(batch, step.step, step.chunks, hidden_BH)
            if not self._varlen:
                batch.catch_up()
            return launched
        if self._varlen:
            return self._decode_varlen(batch, hidden_BH)
        rows = self._num_rows(step)
        needs = batch.needs if self._is_last else GREEDY
        with_logits = self._is_last and batch.max_logprobs >= 0
        key = GraphKey(step.slot, rows, needs, with_logits, batch.has_groups)
        output = self.graph_runner.run(key)
        num_rows = step.num_rows
        logprobs = None
        if output.logits_BV is not None:
            logits_SV, ids_S = output.logits_BV[:num_rows], output.result[:num_rows]
            logprobs = self._logprobs(logits_SV, ids_S, batch.request_rows)
        return LaunchedStep(output.result, self._request_rows_of(batch, rows), logprobs)

    def _drafted_ids(self, step: DecodeScheduled) -> torch.Tensor:
        """What the rows of a step with drafts compute: int64 [rows]."""
        ids = [token_id for drafted in step.verified for token_id in drafted.token_ids]
        return self._stream.upload(np.array(ids, dtype=np.int64))

    def _verify_varlen(
        self,
        step: DecodeScheduled,
        batch: DecodeBatch,
        drafted: list[Placed],
        hidden_BH: torch.Tensor | None,
    ) -> LaunchedStep:
        """A step with drafts as chunks, each of which samples behind all of its tokens."""
        layout = self._on_device(drafted)
        request_rows_S = batch.device["request_rows"][: step.num_rows]
        inputs = self._drafted_ids(step) if hidden_BH is None else hidden_BH
        if not self._is_last:
            return LaunchedStep(self._model.forward(inputs, layout, None), request_rows_S)
        rows_S = self._stream.upload(np.arange(step.num_rows))
        logits_SV = self._model.forward(inputs, layout, rows_S)
        request_rows = np.array([seq.sequence_id for seq, _ in drafted])
        columns, positions_S = batch.columns(step.num_rows), layout.positions_T + 1
        return self._sample(logits_SV, request_rows, positions_S, columns, GREEDY)

    def _num_rows(self, step: DecodeScheduled) -> int:
        """Rows that are computed and sent; every stage comes to the same number."""
        if self._varlen:
            return step.num_rows
        return next(size for size in self._buckets if size >= step.num_rows)

    def _request_rows_of(self, batch: DecodeBatch, num_rows: int) -> torch.Tensor:
        return self._slices.of(batch.device["request_rows"], num_rows)

    def _decode_varlen(self, batch: DecodeBatch, hidden_BH: torch.Tensor | None) -> LaunchedStep:
        """A decode step from lengths that the host knows; tokens still come from the device."""
        layout = self._on_device(self._decode_seq_lens(batch))
        request_rows_S = batch.device["request_rows"][: len(batch)]
        inputs = self._latest_ids(batch) if hidden_BH is None else hidden_BH
        result = self._model.forward_decode(inputs, layout)
        if not self._is_last:
            return LaunchedStep(result, request_rows_S)
        columns, positions_S = batch.columns(len(batch)), layout.kv_lens_B.long()
        return self._sample(result, batch.request_rows, positions_S, columns, batch.needs)

    def _chunks_behind(
        self,
        batch: DecodeBatch | None,
        number: int,
        chunks: Sequence[ScheduledSequence],
        hidden_TH: torch.Tensor | None,
    ) -> LaunchedStep:
        """A step of prompt chunks, behind a token of each of `batch`'s sequences, if there are."""
        seq_lens = [] if batch is None else self._decode_seq_lens(batch)
        first_row = len(seq_lens)
        layout = self._on_device(seq_lens + self.request_table.place(chunks, number, first_row))
        inputs = hidden_TH
        if inputs is None:
            inputs = self._stream.upload(self.request_table.input_ids(chunks))
            if batch is not None:
                inputs = torch.cat((self._latest_ids(batch), inputs))
        request_rows = self.request_table.sampled_request_rows(chunks)
        rows, positions = (
            sampled_rows(chunks, first_row),
            self.request_table.num_computed[request_rows],
        )
        if batch is not None:
            request_rows = np.concatenate((batch.request_rows, request_rows))
            rows = np.concatenate((np.arange(first_row), rows))
            positions = np.concatenate((batch.lengths, positions))
        request_rows_S = self._stream.upload(request_rows)
        if not self._is_last:
            return LaunchedStep(self._model.forward(inputs, layout, None), request_rows_S)
        logits_SV = self._model.forward(inputs, layout, self._stream.upload(rows))
        if not len(request_rows):
            # For the first stage to see that the step is done.
            return LaunchedStep(request_rows_S.new_zeros(1), request_rows_S)
        positions_S = self._stream.upload(positions.astype(np.int64))
        columns, needs = self._settings(request_rows, request_rows_S)
        return self._sample(logits_SV, request_rows, positions_S, columns, needs)

    def _decode_seq_lens(self, batch: DecodeBatch) -> list[tuple[SequenceLens, Sequence[int]]]:
        """Where the rows of a batch lie in a step, and their page tables."""
        rows = zip(batch.request_rows.tolist(), batch.lengths.tolist(), strict=True)
        return [
            (SequenceLens(request_row, row, 1, length), self.request_table.pages[request_row])
            for row, (request_row, length) in enumerate(rows)
        ]

    def _latest_ids(self, batch: DecodeBatch) -> torch.Tensor:
        """What the rows of a batch sampled last; -1, logits that were not finite, is read as 0."""
        request_rows_S = batch.device["request_rows"][: len(batch)]
        return self._tensors.last_token.index_select(0, request_rows_S).clamp_(min=0)

    # ---- sampling --------------------------------------------------------------------------------

    def _settings(
        self, request_rows: np.ndarray, request_rows_S: torch.Tensor
    ) -> tuple[SamplingColumns, SamplingNeeds]:
        """How the sequences of a prefill step sample."""
        needs = self.request_table.needs_of(request_rows)
        columns = SamplingColumns(
            {
                name: self._stream.upload(column[request_rows])
                for name, column in self.request_table.columns.items()
            },
            request_rows_S,
        )
        return columns, needs

    def _sample(
        self,
        logits_SV: torch.Tensor,
        request_rows: np.ndarray,
        positions_S: torch.Tensor,
        columns: SamplingColumns,
        needs: SamplingNeeds,
    ) -> LaunchedStep:
        """Draw a token per row, outside of a graph."""
        request_rows_S, history = columns.request_rows_S, self._tensors.history
        ids_S = sample_on_device(logits_SV, columns, positions_S, needs, history)
        ids_S = self._model.lanes.from_first(ids_S)
        history.add(needs, request_rows_S, ids_S)
        if self._is_first:
            self.take_ids(request_rows_S, ids_S)
        return LaunchedStep(ids_S, request_rows_S, self._logprobs(logits_SV, ids_S, request_rows))

    def input_buffers(self) -> list[torch.Tensor]:
        """Where the inputs of decode steps arrive: of each size, hidden states, or ids."""
        hidden_in_BH = self._tensors.hidden_in_BH
        if hidden_in_BH is None:
            return [self.ids_buffer(rows) for rows in self._buckets]
        return [self._slices.of(hidden_in_BH, rows) for rows in self._buckets]

    def ids_buffer(self, num_rows: int) -> torch.Tensor:
        """Where the ids of a decode step arrive: int64 [num_rows] (first stage)."""
        return self._feedback.buffer(num_rows)

    def take_ids(self, request_rows_S: torch.Tensor, ids_S: torch.Tensor) -> None:
        """The tokens that sequences sampled, for the next step's input (first stage)."""
        self._feedback.take(request_rows_S, ids_S)

    def _logprobs(
        self, logits_SV: torch.Tensor, ids_S: torch.Tensor, request_rows: np.ndarray
    ) -> LogprobTensors | None:
        num_top: list[int] = self.request_table.num_logprobs[request_rows].tolist()
        if max(num_top) < 0:
            return None
        selected = select_logprobs(logits_SV, ids_S, max(num_top))
        host = [self._stream.download(tensor) for tensor in (ids_S, *selected)]
        return LogprobTensors(host[0], host[1], host[2], host[3], tuple(num_top))
