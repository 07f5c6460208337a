"""Opens a device's lane, and an `AheadEngine` on it: tables on the host, tensors on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mpipipe.planning.gpu_limits import num_seats
from mpipipe.stage.cpu_lane import CpuLane
from mpipipe.stage.decode_batch import DecodeBatch
from mpipipe.stage.decode_program import DecodePrograms, StageTensors
from mpipipe.stage.engine import AheadEngine
from mpipipe.stage.lane import CudaLane
from mpipipe.stage.seats import SeatTable
from mpipipe.stage.token_history import TokenHistory

if TYPE_CHECKING:
    from mpipipe.clock import Clock
    from mpipipe.kv_cache.base import KVCache
    from mpipipe.models.adapter import StageModel
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.progress import ProgressEngine
    from mpipipe.stage.lane import Lane

__all__ = ["open_engine", "open_lane"]


def open_lane(
    device: torch.device, clock: Clock, progress: ProgressEngine, *, num_threads: int = 1
) -> Lane:
    """The lane of `device`, entered by this thread.

    Args:
        device: of the stage.
        clock: monotonic seconds.
        progress: told while a CPU computes, so that polling does not take the core.
        num_threads: that torch computes with on a CPU.
    """
    if device.type != "cuda":
        return CpuLane(device, clock, progress, num_threads=num_threads)
    torch.cuda.set_device(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # weights may still be on their way
    lane = CudaLane(device, stream)
    lane.enter()
    return lane


def open_engine(
    plan: PipelinePlan,
    model: StageModel,
    cache: KVCache,
    lane: Lane,
    *,
    attention_needs_seq_lens: bool,
) -> AheadEngine:
    """Tables and device tensors for `plan`; nothing is captured yet."""
    max_pages = -(-plan.max_sequence_tokens // plan.page_size_tokens)
    rows = plan.max_sequences_per_slot
    seats = SeatTable(num_seats(plan.num_slots, rows), max_pages, model.vocab_size)
    unused = (seats.num_seats, plan.num_kv_pages)
    batches = tuple(
        DecodeBatch(seats, lane, max_rows=rows, unused=unused) for _ in range(plan.num_slots)
    )
    use_graphs = plan.cuda_graphs and not model.graphs_unsupported_reason()
    tensors = _open_tensors(plan, model, cache, lane, use_graphs=use_graphs)
    programs = DecodePrograms(
        model,
        batches,
        tensors,
        lane,
        page_size=plan.page_size_tokens,
        max_kv_len=plan.max_sequence_tokens,
        use_graphs=use_graphs,
    )
    return AheadEngine(
        plan,
        model,
        lane,
        seats=seats,
        batches=batches,
        tensors=tensors,
        programs=programs,
        ragged=attention_needs_seq_lens,
    )


def _open_tensors(
    plan: PipelinePlan, model: StageModel, cache: KVCache, lane: Lane, *, use_graphs: bool
) -> StageTensors:
    rows = plan.max_sequences_per_slot
    seats = num_seats(plan.num_slots, rows)
    hidden_in_BH = None
    if not model.plan.has_embedding:
        hidden_in_BH = torch.zeros(rows, plan.hidden_size, dtype=model.dtype, device=lane.device)
    last_token = torch.zeros(seats + 1, dtype=torch.int64, device=lane.device)
    sent_ids = None
    if use_graphs and model.plan.has_head and not model.plan.has_embedding:
        sent_ids = last_token.new_zeros(plan.num_slots, rows)
    history = TokenHistory(seats + 1, model.vocab_size, lane.device)
    return StageTensors(cache, last_token, history, hidden_in_BH, sent_ids)
