"""Opens a device's stream, and a `StageEngine` on it: tables on the host, tensors on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mpipipe.kv_cache.host_pages import HostPages
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.planning.step_limits import num_request_rows
from mpipipe.stage.cpu_stream import CpuStream
from mpipipe.stage.cuda_graph_runner import CudaGraphRunner, StageTensors
from mpipipe.stage.cuda_stream import CudaStream
from mpipipe.stage.decode_batch import DecodeBatch
from mpipipe.stage.engine import StageEngine
from mpipipe.stage.ranges import NO_RANGES
from mpipipe.stage.request_table import RequestTable
from mpipipe.stage.token_history import TokenHistory

if TYPE_CHECKING:
    from mpipipe.clock import Clock
    from mpipipe.kv_cache.base import KVCache
    from mpipipe.models.adapter import StageModel
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.progress import ProgressEngine
    from mpipipe.stage.ranges import Ranges
    from mpipipe.stage.stream import Stream

__all__ = ["open_engine", "open_stream"]


def open_stream(
    device: torch.device,
    clock: Clock,
    progress: ProgressEngine,
    *,
    num_threads: int = 1,
    waits_on_host: bool = False,
) -> Stream:
    """The stream of `device`, entered by this thread.

    Args:
        device: of the stage.
        clock: monotonic seconds.
        progress: told while a CPU computes, so that polling does not take the core.
        num_threads: that torch computes with on a CPU.
        waits_on_host: steps may wait for the disk while they are added to a GPU's stream.
    """
    if device.type != "cuda":
        return CpuStream(device, clock, progress, num_threads=num_threads)
    torch.cuda.set_device(device)
    cuda_stream = torch.cuda.Stream(device)
    cuda_stream.wait_stream(torch.cuda.current_stream(device))  # weights may still be on their way
    stream = CudaStream(device, cuda_stream, progress if waits_on_host else None)
    stream.enter()
    return stream


def open_engine(
    plan: PipelinePlan,
    model: StageModel,
    cache: KVCache,
    stream: Stream,
    *,
    attention_needs_seq_lens: bool,
    ranges: Ranges = NO_RANGES,
    host_memory: torch.Tensor | None = None,
) -> StageEngine:
    """Tables and device tensors for `plan`; nothing is captured yet.

    `host_memory`: for the plan's pages in host memory, as `HostPages` takes it.
    """
    max_pages = -(-plan.max_sequence_tokens // plan.page_size_tokens)
    request_table = RequestTable(
        num_request_rows(plan.num_slots, plan.max_sequences_per_slot),
        max_pages,
        model.vocab_size,
        plan.page_size_tokens,
    )
    batches = _open_batches(plan, request_table, stream)
    use_graphs = plan.cuda_graphs and not model.graphs_unsupported_reason()
    tensors = _open_tensors(plan, model, cache, stream, host_memory, use_graphs=use_graphs)
    graph_runner = CudaGraphRunner(
        model,
        batches,
        tensors,
        stream,
        page_size=plan.page_size_tokens,
        max_kv_len=plan.max_sequence_tokens,
        use_graphs=use_graphs,
        ranges=ranges,
    )
    return StageEngine(
        plan,
        model,
        stream,
        request_table=request_table,
        batches=batches,
        tensors=tensors,
        graph_runner=graph_runner,
        varlen=attention_needs_seq_lens,
    )


def _open_batches(
    plan: PipelinePlan, request_table: RequestTable, stream: Stream
) -> tuple[DecodeBatch, ...]:
    rows = plan.max_decode_rows
    unused = (request_table.num_request_rows, plan.num_kv_pages)
    return tuple(
        DecodeBatch(
            request_table,
            stream,
            max_rows=rows,
            unused=unused,
            groups_rows=plan.read_prefixes_once,
        )
        for _ in range(plan.num_slots)
    )


def _open_host_pages(
    plan: PipelinePlan, cache: KVCache, stream: Stream, host_memory: torch.Tensor | None
) -> HostPages | None:
    if host_memory is None:
        return None
    assert isinstance(cache, PagedKVCache), "other caches have no pages"
    num_pages = plan.num_host_pages
    return HostPages(cache, host_memory, num_pages, lambda ids: stream.upload(ids.numpy()))


def _open_tensors(
    plan: PipelinePlan,
    model: StageModel,
    cache: KVCache,
    stream: Stream,
    host_memory: torch.Tensor | None,
    *,
    use_graphs: bool,
) -> StageTensors:
    rows = plan.max_decode_rows
    request_rows = num_request_rows(plan.num_slots, plan.max_sequences_per_slot)
    hidden_in_BH = None
    if not model.plan.has_embedding:
        hidden_in_BH = torch.zeros(rows, plan.hidden_size, dtype=model.dtype, device=stream.device)
    num_drafted = 0 if plan.drafts is None else rows  # rows of drafts have places of their own
    last_token = torch.zeros(
        request_rows + 1 + num_drafted, dtype=torch.int64, device=stream.device
    )
    sent_ids = None
    if use_graphs and model.plan.has_head and not model.plan.has_embedding:
        sent_ids = last_token.new_zeros(plan.num_slots, rows)
    history = TokenHistory(request_rows + 1, model.vocab_size, stream.device)
    host_pages = _open_host_pages(plan, cache, stream, host_memory)
    return StageTensors(cache, last_token, history, hidden_in_BH, sent_ids, host_pages)
