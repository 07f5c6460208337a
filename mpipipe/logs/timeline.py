"""A run as a timeline for Perfetto or chrome://tracing: all ranks on rank 0's clock.

Format: the JSON object form of the Trace Event Format, complete events ("ph": "X"), instants,
counters and flows, in microseconds since the first event. One process per rank with a track each
for boot, compute, transfer, waiting, sending, events of its log, and the control messages that it
sent and received (`log.level = "debug"`), each a moment, with an arrow to where it came; one
process for the requests, a track per slot's place. Events of a track do not overlap: viewers drop
those that do. The file is written while it is made, so a run of any length fits in memory.
"""

from __future__ import annotations

import heapq
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from mpipipe.errors import OutputError
from mpipipe.logs.clocks import RankClocks, read_clocks
from mpipipe.logs.reading import Line, RunFiles, number, text, whole

__all__ = ["write_timeline"]

Event = dict[str, Any]
_US = 1e6
_REQUESTS_PID = 1_000_000  # above every rank
_TRACKS = ("boot", "compute", "transfer", "wait", "idle", "overhead", "send", "log",
           "messages sent", "messages received")  # fmt: skip
_MESSAGE_US = 0.5  # drawn so long: an arrow needs an event with a length at each end
_MOST_MESSAGES = 1 << 32  # on one way between two ranks, for the number of an arrow
# The order within a step; overhead lies on both sides of the compute and is drawn before it.
_IN_ORDER = ("idle", "wait", "transfer", "overhead", "compute", "send")
_TOLD = ("step", "slot", "phase", "num_rows", "num_tokens", "bytes_in", "bytes_out", "bytes",
         "peer", "number")  # fmt: skip
_COUNTERS = {
    "cpu_percent": "CPU %",
    "node_cpu_percent": "node CPU %",
    "rss_bytes": "RSS bytes",
    "num_running": "running",
    "num_waiting": "waiting",
    "kv_pages_used": "cache pages",
    "num_output_tokens": "output tokens",
}


def write_timeline(files: RunFiles, path: Path, attempt: int, num_steps: int) -> int:
    """Write the timeline of `attempt` to `path`; returns the number of events.

    num_steps: only so many steps of each rank, the last ones; 0: all.

    Raises:
        OutputError: the file cannot be written.
    """
    clocks = read_clocks(files.lines("clock.jsonl", attempt))
    origin_s = _origin_s(files, clocks, attempt)
    try:
        with path.open("w", encoding="utf-8") as file:
            return _write(file, _events(files, clocks, attempt, origin_s, num_steps))
    except OSError as error:
        raise OutputError(
            f"the timeline cannot be written to {path} ({error.strerror}): choose another -o FILE"
        ) from error


def _write(file: TextIO, events: Iterator[Event]) -> int:
    count = 0
    file.write('{"displayTimeUnit": "ms", "traceEvents": [')
    for count, event in enumerate(events, start=1):
        file.write("\n" if count == 1 else ",\n")
        file.write(json.dumps(event))
    file.write("\n]}\n")
    return count


def _origin_s(files: RunFiles, clocks: RankClocks, attempt: int) -> float:
    """The first moment of the attempt that anything tells of."""
    found: list[float] = []
    for rank in files.ranks():
        for line in files.log_lines(rank, attempt):
            times = (number(line, "t_s"), number(line, "start_s"))
            found += [clocks.on_head(rank, t_s) for t_s in times if t_s is not None]
        firsts = (files.sample_lines(rank, attempt), files.message_lines(rank, attempt))
        for line in chain.from_iterable(islice(lines, 1) for lines in firsts):
            if (t_s := number(line, "t_s")) is not None:
                found.append(clocks.on_head(rank, t_s))
        for _, line in files.step_lines(rank, attempt):
            if (start_s := number(line, "start_s")) is not None:
                found.append(clocks.on_head(rank, start_s))
                break
    return min(found, default=0.0)


def _events(
    files: RunFiles, clocks: RankClocks, attempt: int, origin_s: float, num_steps: int
) -> Iterator[Event]:
    arrows = _Arrows.read(files, attempt)
    for rank in files.ranks():
        tracks = _Tracks(rank)

        def at(t_s: float, rank: int = rank) -> float:
            return max(0.0, round((clocks.on_head(rank, t_s) - origin_s) * _US, 3))

        title = f"rank {rank}"
        for line in files.log_lines(rank, attempt):
            if title == f"rank {rank}" and (host := text(line, "host")):
                title = f"stage {line.get('stage')}, rank {rank} on {host}"
                if replica := whole(line, "replica"):
                    title = f"replica {replica}, {title}"
            yield from _log_events(tracks, line, at)
        yield from _names(rank, title)
        steps = (line for _, line in files.step_lines(rank, attempt))
        for line in deque(steps, num_steps) if num_steps else steps:
            yield from _step_events(tracks, line, at)
        for line in files.sample_lines(rank, attempt):
            yield from _counter_events(rank, line, at)
        for line in files.message_lines(rank, attempt):
            yield from _message_events(tracks, line, at, arrows)
    yield from _request_events(files, attempt, origin_s)


def _names(rank: int, title: str) -> Iterator[Event]:
    yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": title}}
    yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}
    for tid, track in enumerate(_TRACKS):
        yield {"ph": "M", "pid": rank, "tid": tid, "name": "thread_name", "args": {"name": track}}


class _Tracks:
    """The tracks of one rank, on which no event begins before the one before it has ended."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._ended_us: dict[str, float] = {}

    def span(
        self,
        track: str,
        name: str,
        span_us: tuple[float, float],
        line: Line,
        *,
        least_us: float = 0.0,
    ) -> Event:
        """An event from `span_us[0]` to `span_us[1]` with what `line` tells of it.

        `least_us`: it is drawn so long at least.
        """
        # Times were rounded, so neighbours may overlap by a microsecond.
        begin_us = max(span_us[0], self._ended_us.get(track, 0.0))
        end_us = max(round(begin_us + least_us, 3), round(span_us[1], 3))
        self._ended_us[track] = end_us
        return {
            "ph": "X",
            "pid": self.rank,
            "tid": _TRACKS.index(track),
            "name": name,
            "cat": track,
            "ts": begin_us,
            "dur": round(end_us - begin_us, 3),
            "args": {field: line[field] for field in _TOLD if line.get(field) is not None},
        }


@dataclass(frozen=True, slots=True)
class _Arrows:
    """Which control messages are on record at both of their ends."""

    num_ranks: int
    both: set[int]

    @staticmethod
    def read(files: RunFiles, attempt: int) -> _Arrows:
        ranks = files.ranks()
        num_ranks = max(ranks, default=0) + 1
        ends: dict[str, set[int]] = {"sent": set(), "received": set()}
        for rank in ranks:
            for line in files.message_lines(rank, attempt):
                if (way := text(line, "way")) in ends:
                    ends[way].add(_arrow(rank, line, num_ranks))
        return _Arrows(num_ranks, ends["sent"] & ends["received"])

    def end(self, line: Line, drawn: Event) -> Iterator[Event]:
        """The beginning or the end of the message's arrow, at the event that was `drawn` for it."""
        flow_id = _arrow(drawn["pid"], line, self.num_ranks)
        if flow_id in self.both:
            is_sent = text(line, "way") == "sent"
            flow = {name: drawn[name] for name in ("pid", "tid", "name", "ts")}
            flow |= {"ph": "s"} if is_sent else {"ph": "f", "bp": "e"}
            yield {**flow, "cat": "message", "id": flow_id}


def _arrow(rank: int, line: Line, num_ranks: int) -> int:
    """A number that both ends of a message have, and no other one."""
    peer = whole(line, "peer")
    source, to = (rank, peer) if text(line, "way") == "sent" else (peer, rank)
    return (source * num_ranks + to) * _MOST_MESSAGES + whole(line, "number")


def _message_events(tracks: _Tracks, line: Line, at: Any, arrows: _Arrows) -> Iterator[Event]:
    t_s, way = number(line, "t_s"), text(line, "way")
    if t_s is None or way not in {"sent", "received"}:
        return
    moment_us = (at(t_s), at(t_s))
    kind = text(line, "kind")
    drawn = tracks.span(f"messages {way}", kind, moment_us, line, least_us=_MESSAGE_US)
    yield drawn
    yield from arrows.end(line, drawn)


def _log_events(tracks: _Tracks, line: Line, at: Any) -> Iterator[Event]:
    t_s, event = number(line, "t_s"), text(line, "event")
    begin_s, end_s = number(line, "start_s"), number(line, "end_s")
    if event == "boot" and begin_s is not None and end_s is not None:
        yield tracks.span("boot", text(line, "name"), (at(begin_s), at(end_s)), line)
    elif t_s is not None:
        yield {
            "ph": "i",
            "s": "t",
            "pid": tracks.rank,
            "tid": _TRACKS.index("log"),
            "name": event,
            "cat": text(line, "level"),
            "ts": at(t_s),
        }


def _step_events(tracks: _Tracks, line: Line, at: Any) -> Iterator[Event]:
    begin_s, step = number(line, "start_s"), whole(line, "step", -1)
    if begin_s is None or step < 0:
        return
    for part in _IN_ORDER:
        seconds = number(line, f"{part}_s") or 0.0
        if seconds > 0:
            name = f"step {step} slot {line.get('slot')}" if part == "compute" else part
            begin_us = at(begin_s)
            yield tracks.span(part, name, (begin_us, begin_us + seconds * _US), line)
        begin_s += max(0.0, seconds)


def _counter_events(rank: int, line: Line, at: Any) -> Iterator[Event]:
    t_s = number(line, "t_s")
    if t_s is None:
        return
    for field, name in _COUNTERS.items():
        if (value := number(line, field)) is not None:
            yield {"ph": "C", "pid": rank, "name": name, "ts": at(t_s), "args": {name: value}}


def _request_events(files: RunFiles, attempt: int, origin_s: float) -> Iterator[Event]:
    """Each request on the first free track of its slot: queue, first token, the rest."""
    spans: list[tuple[float, float, int, Line]] = []
    for line in files.lines("requests.jsonl", attempt):
        arrived_s, finished_s = number(line, "arrived_s"), number(line, "finished_s")
        if arrived_s is not None and finished_s is not None:
            begin_s = number(line, "admitted_s") or arrived_s
            spans.append((begin_s, max(begin_s, finished_s), len(spans), line))
    if spans:
        yield {
            "ph": "M", "pid": _REQUESTS_PID, "name": "process_name", "args": {"name": "requests"},
        }  # fmt: skip
    free: dict[tuple[int, int], list[tuple[float, int]]] = {}  # replica, slot → free from, track
    num_tracks = 0
    for begin_s, end_s, _, line in sorted(spans):
        replica = whole(line, "on_replica")
        tracks = free.setdefault((replica, whole(line, "slot", -1)), [])
        if tracks and tracks[0][0] <= begin_s:
            track = heapq.heappop(tracks)[1]
        else:
            track, num_tracks = num_tracks, num_tracks + 1
            yield {
                "ph": "M", "pid": _REQUESTS_PID, "tid": track, "name": "thread_name",
                "args": {"name": f"slot {line.get('slot')}{_of_replica(replica)}"},
            }  # fmt: skip
        heapq.heappush(tracks, (end_s, track))
        yield from _request_spans(line, track, begin_s, end_s, origin_s)


def _of_replica(replica: int) -> str:
    return f" of replica {replica}" if replica else ""


def _request_spans(
    line: Line, track: int, begin_s: float, end_s: float, origin_s: float
) -> Iterator[Event]:
    first_s = number(line, "first_token_s")
    cut_s = end_s if first_s is None else min(max(first_s, begin_s), end_s)
    arguments = {name: value for name, value in line.items() if name != "token_s"}
    for name, since_s, until_s in (("prefill", begin_s, cut_s), ("decode", cut_s, end_s)):
        if until_s > since_s:
            since_us = max(0.0, round((since_s - origin_s) * _US, 3))
            until_us = round((until_s - origin_s) * _US, 3)
            yield {
                "ph": "X",
                "pid": _REQUESTS_PID,
                "tid": track,
                "name": f"{text(line, 'id')} {name}",
                "cat": "request",
                "ts": since_us,
                "dur": max(0.0, round(until_us - since_us, 3)),
                "args": arguments,
            }
