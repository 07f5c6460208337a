"""A timeline of stages for Perfetto or chrome://tracing, from step records on one clock.

Format: the JSON object form of the Trace Event Format, complete events ("ph": "X", microseconds).
One process per rank, one track each for compute, waiting for input, sending and idle.
`bench.timeline` gathers the records and compares the clocks. Overhead has no track: a record holds
when the compute ended, but not which part of it the compute thread itself took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpipipe.metrics.accounting import StepRecord

__all__ = ["decode_records", "last_steady", "trace_document"]

# Track → the two fields of a record that it lies between.
_TRACKS = {
    "compute": ("input_ready_s", "compute_end_s"),
    "wait for input": ("scheduled_s", "input_ready_s"),
    "send": ("compute_end_s", "send_end_s"),
    "idle": ("start_s", "scheduled_s"),
}
_US = 1e6


def decode_records(records: Sequence[StepRecord]) -> list[StepRecord]:
    """The steps that made a token from every row they computed."""
    return [record for record in records if record.num_tokens == record.num_sampled]


def last_steady(records: Sequence[StepRecord], num_steps: int) -> list[StepRecord]:
    """The last `num_steps` steady steps; where there are none at all, the last decode steps.

    A batch that leaves slots empty (one prompt in two slots) is never steady.
    """
    steady = [record for record in records if record.steady]
    return (steady or decode_records(records))[-num_steps:]


def trace_document(
    records_of_rank: Mapping[int, Sequence[StepRecord]],
    *,
    names: Mapping[int, str],
    offsets_s: Mapping[int, float],
) -> dict[str, Any]:
    """The trace as a JSON document.

    Args:
        records_of_rank: of each rank, on its own clock.
        names: what to call each rank's process, such as "stage 0, rank 0 on node1".
        offsets_s: how far each rank's clock is ahead of the head's; missing: 0.
    """
    aligned = {rank: offsets_s.get(rank, 0.0) for rank in records_of_rank}
    starts = [
        record.start_s - aligned[rank]
        for rank, records in records_of_rank.items()
        for record in records
    ]
    origin_s = min(starts, default=0.0)
    events: list[dict[str, Any]] = []
    for rank, records in sorted(records_of_rank.items()):
        events += _names(rank, names[rank])
        for record in records:
            events += _events(rank, record, origin_s + aligned[rank])
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _names(rank: int, name: str) -> list[dict[str, Any]]:
    process: dict[str, Any] = {"ph": "M", "pid": rank, "name": "process_name"}
    events = [{**process, "args": {"name": name}}]
    events += [
        {"ph": "M", "pid": rank, "tid": tid, "name": "thread_name", "args": {"name": track}}
        for tid, track in enumerate(_TRACKS)
    ]
    return events


def _events(rank: int, record: StepRecord, origin_s: float) -> list[dict[str, Any]]:
    """One event per track, times without length left out."""
    arguments = {
        "step": record.step,
        "slot": record.slot,
        "rows": record.num_tokens,
        "sampled": record.num_sampled,
        "steady": record.steady,
    }
    events = []
    for tid, (track, (first, last)) in enumerate(_TRACKS.items()):
        begin_s, end_s = getattr(record, first), getattr(record, last)
        if end_s > begin_s:
            events.append(
                {
                    "ph": "X",
                    "pid": rank,
                    "tid": tid,
                    "name": f"step {record.step} slot {record.slot}" if tid == 0 else track,
                    "cat": track,
                    "ts": round((begin_s - origin_s) * _US, 3),
                    "dur": round((end_s - begin_s) * _US, 3),
                    "args": arguments,
                }
            )
    return events
