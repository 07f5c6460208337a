"""`CudaGraphRunner`: what a stage computes in a decode step, replayed as CUDA graphs.

One graph per slot, number of rows and sampling operations. Its work is plain torch: advance the
lengths, look the inputs up, run the layers, sample. `memory.cuda_graphs = false` and CPUs run that
work as it is; it is the oracle of the graphs, which replay the very same calls.

Where rows may read common pages together, there is a second graph of each kind that does so. A
single one, with a launch that finds no group, would cost every layer of every other step 2 to 3 µs
(by estimate); the second one costs its capture, and only where that is switched on.

The outputs of a graph stay at the same addresses, valid until the next run of any graph: captured
graphs share their work space, and all write logits to one place. Ids that leave this stage
outlast that, as they are sent beside the stream: see `StageTensors.sent_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpipipe.kv_cache.layout import decode_layout
from mpipipe.sampling_options import SamplingNeeds
from mpipipe.stage.device_sampler import sample_on_device
from mpipipe.stage.ranges import NO_RANGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from mpipipe.kv_cache.base import KVCache
    from mpipipe.kv_cache.host_pages import HostPages
    from mpipipe.models.adapter import StageModel
    from mpipipe.stage.decode_batch import DecodeBatch
    from mpipipe.stage.ranges import Ranges
    from mpipipe.stage.stream import Stream
    from mpipipe.stage.token_history import TokenHistory

__all__ = ["GREEDY", "CudaGraphRunner", "DecodeOutput", "GraphKey", "StageTensors"]


GREEDY = SamplingNeeds.NOTHING


@dataclass(frozen=True, slots=True)
class StageTensors:
    """Device tensors that all steps of a stage share."""

    cache: KVCache
    # int64 [request rows + 1 + rows of drafts]: the token each sequence sampled last, and what the
    # rows of drafts compute (stage 0).
    last_token: torch.Tensor
    history: TokenHistory  # what the penalties remember (last stage)
    hidden_in_BH: torch.Tensor | None  # where hidden states arrive; None on the first stage
    # int64 [slots, rows]: ids on their way to the head, which no other slot's step overwrites. Only
    # on the last of several stages, and where graphs are captured: otherwise each step's are new.
    sent_ids: torch.Tensor | None = None
    host_pages: HostPages | None = None  # None: no page is ever moved


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What makes two graphs different."""

    slot: int
    num_rows: int
    needs: SamplingNeeds = GREEDY
    with_logits: bool = False  # kept for log-probabilities
    in_groups: bool = False  # rows that begin with the same pages read them once

    def serves(self, other: GraphKey) -> bool:
        """Whether this graph does all that `other` does, for the same rows."""
        return (
            (self.slot, self.num_rows) == (other.slot, other.num_rows)
            and self.needs | other.needs == self.needs
            and self.with_logits >= other.with_logits
            and self.in_groups >= other.in_groups
        )

    @property
    def num_options(self) -> int:
        """How much it does."""
        return self.needs.value.bit_count() + self.with_logits + self.in_groups


@dataclass(slots=True)
class DecodeOutput:
    """What a step leaves, for all rows of its graph."""

    result: torch.Tensor  # hidden [B, hidden], or ids int64 [B] on the last stage
    logits_BV: torch.Tensor | None = None


class CudaGraphRunner:
    """The decode steps of a stage, by slot, rows and sampling: run as they are, or captured.

    Args:
        model: the stage, loaded.
        batches: by slot.
        tensors: what the steps share.
        stream: the device.
        page_size: tokens per page.
        max_kv_len: what no sequence exceeds.
        use_graphs: capture; else run the work itself each time.
        ranges: names the replays for a profiler.
    """

    def __init__(
        self,
        model: StageModel,
        batches: tuple[DecodeBatch, ...],
        tensors: StageTensors,
        stream: Stream,
        *,
        page_size: int,
        max_kv_len: int,
        use_graphs: bool,
        ranges: Ranges = NO_RANGES,
    ) -> None:
        self._model = model
        self._batches = batches
        self._tensors = tensors
        self._stream = stream
        self._page_size = page_size
        self._max_kv_len = max_kv_len
        self.use_graphs = use_graphs
        self._ranges = ranges
        # Graphs by what they do, and by what else they have served for.
        self._replays: dict[GraphKey, tuple[Callable[[], None], DecodeOutput]] = {}
        self._num_graphs = 0
        self._logits_RV: torch.Tensor | None = None  # of the latest step that keeps them

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return self._num_graphs

    def results(self) -> list[torch.Tensor]:
        """What the captured graphs leave: where decode steps' results are found."""
        return [output.result for _, output in self._replays.values()]

    def prepare(self, keys: Iterable[GraphKey]) -> None:
        """Run every step once on rows without sequences, and capture it."""
        for key in keys:
            self._work(key)
            if self.use_graphs:
                self._capture(key)

    def run(self, key: GraphKey) -> DecodeOutput:
        """Add a step to the stream.

        Where there is no graph for `key`, the least that does more is the fallback: it chooses the
        same tokens. Without one, the step is captured first, which waits for the stream.
        """
        if not self.use_graphs:
            return self._work(key)
        found = self._replays.get(key) or self._fallback_graph(key) or self._capture_late(key)
        found[0]()
        return found[1]

    def _fallback_graph(self, key: GraphKey) -> tuple[Callable[[], None], DecodeOutput] | None:
        able = [other for other in self._replays if other.serves(key)]
        if not able:
            return None
        replay, output = self._replays[min(able, key=lambda other: other.num_options)]
        logits_BV = output.logits_BV if key.with_logits else None
        self._replays[key] = (replay, DecodeOutput(output.result, logits_BV))
        return self._replays[key]

    def _capture_late(self, key: GraphKey) -> tuple[Callable[[], None], DecodeOutput]:
        """Capture in the middle of a run: sampling options that were not known at boot.

        The trial run is this very step, so it writes the keys and values that the replay will write
        again; what it advances (lengths, last tokens, history) is put back.
        """
        tensors, batch = self._tensors, self._batches[key.slot].device
        advanced = (batch["kv_len"], tensors.last_token)
        kept = [tensor.clone() for tensor in advanced]
        request_rows_B = batch["request_rows"][: key.num_rows]
        history = tensors.history.rows(request_rows_B)
        self._work(key)
        for tensor, before in zip(advanced, kept, strict=True):
            tensor.copy_(before)
        tensors.history.put_rows(request_rows_B, history)
        self._stream.drain()
        return self._capture(key)

    def _capture(self, key: GraphKey) -> tuple[Callable[[], None], DecodeOutput]:
        outputs: list[DecodeOutput] = []
        replay = self._stream.capture(lambda: outputs.append(self._work(key)))
        assert replay is not None, "graphs are used on GPUs only"
        replay = self._ranges.replay(f"graph slot {key.slot} rows {key.num_rows}", replay)
        self._replays[key] = (replay, outputs[0])
        self._num_graphs += 1
        return self._replays[key]

    def _work(self, key: GraphKey) -> DecodeOutput:
        batch, rows = self._batches[key.slot], key.num_rows
        tensors, model = batch.device, self._model
        last_token, request_rows_B = self._tensors.last_token, tensors["request_rows"][:rows]
        kv_len_B, pages_BP = tensors["kv_len"][:rows], tensors["pages"][:rows]
        # -1 marks logits that were not finite: read as 0 here, the head sees it and ends the run.
        positions_B, slots_B, tokens_B = model.operations.advance_rows(
            *(kv_len_B, tensors["active"][:rows], pages_BP, request_rows_B, last_token),
            page_size=self._page_size,
        )
        layout = decode_layout(
            pages_BP,
            kv_len_B,
            page_size=self._page_size,
            max_kv_len=self._max_kv_len,
            placed=(positions_B, slots_B),
            common=self._batches[key.slot].common_tables(rows) if key.in_groups else None,
        )
        inputs = tokens_B
        if self._tensors.hidden_in_BH is not None:
            inputs = self._tensors.hidden_in_BH[:rows]
        result = model.forward_decode(inputs, layout)
        if not model.plan.has_head:
            return DecodeOutput(result)
        ids_B = self._sample(key, result, kv_len_B)
        if model.plan.has_embedding:
            last_token.index_copy_(0, request_rows_B, ids_B)
        if self._tensors.sent_ids is not None:
            ids_B = self._tensors.sent_ids[key.slot, :rows].copy_(ids_B)
        return DecodeOutput(ids_B, self._keep(result) if key.with_logits else None)

    def _keep(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """A copy in the one place that all graphs share: each their own would be gigabytes."""
        if self._logits_RV is None:  # in a trial run: not in the memory of a graph
            max_rows = max(batch.max_rows for batch in self._batches)
            self._logits_RV = logits_BV.new_empty(max_rows, logits_BV.shape[1])
        return self._logits_RV[: len(logits_BV)].copy_(logits_BV)

    def _sample(
        self, key: GraphKey, logits_BV: torch.Tensor, kv_len_B: torch.Tensor
    ) -> torch.Tensor:
        lanes = self._model.lanes
        if key.needs == GREEDY:
            return lanes.from_first(self._model.operations.greedy_ids(logits_BV))
        columns = self._batches[key.slot].columns(key.num_rows)
        history = self._tensors.history
        ids_B = sample_on_device(logits_BV, columns, kv_len_B.long(), key.needs, history)
        ids_B = lanes.from_first(ids_B)
        history.add(key.needs, columns.request_rows_S, ids_B)
        return ids_B
