"""The rules of the Trace Event Format that Perfetto and chrome://tracing hold a file to.

After the format's description ("Trace Event Format", docs.google.com/document/d/
1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU) and what Perfetto's importer drops: events of a thread
that overlap without one holding the other, and arrows without an event at each end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["faults"]

Event = Mapping[str, Any]
_METADATA = {"process_name": "name", "thread_name": "name", "process_labels": "labels",
             "process_sort_index": "sort_index", "thread_sort_index": "sort_index"}  # fmt: skip
_PHASES = set("BEXiCMstf")


def faults(document: Any) -> list[str]:
    """What is wrong with a trace in the JSON object form, a sentence each; empty: nothing."""
    if not isinstance(document, dict) or not isinstance(document.get("traceEvents"), list):
        return ["no object with a list of traceEvents"]
    events = document["traceEvents"]
    told = [] if document.get("displayTimeUnit") in {"ms", "ns"} else ["displayTimeUnit"]
    for place, event in enumerate(events):
        told += [f"event {place} ({event}): {fault}" for fault in _faults_of(event)]
    if told:
        return told
    return [*_unnamed(events), *_overlaps(events), *_unbalanced(events), *_loose_arrows(events)]


def _faults_of(event: Any) -> Iterator[str]:
    phase = event.get("ph")
    if phase not in _PHASES:
        yield "no known phase"
        return
    if type(event.get("pid")) is not int:
        yield "pid is no integer"
    if phase not in "CM" and type(event.get("tid")) is not int:
        yield "tid is no integer"
    if not isinstance(event.get("name"), str) and phase != "E":
        yield "no name"
    if phase == "M":
        yield from _faults_of_metadata(event)
        return
    if not _is_time(event.get("ts")):
        yield "ts is no time in microseconds from 0 on"
    if phase == "X" and not _is_time(event.get("dur")):
        yield "dur is no length in microseconds"
    if phase == "i" and event.get("s") not in {"g", "p", "t"}:
        yield "an instant has no scope"
    if phase == "C" and not (
        event.get("args") and all(_is_number(value) for value in event["args"].values())
    ):
        yield "a counter has no numbers"
    if phase in "stf" and not (type(event.get("id")) is int and event.get("cat")):
        yield "an arrow without id or category"
    if phase == "f" and event.get("bp") != "e":
        yield "an arrow's end that binds to the next event, not to the one around it"


def _faults_of_metadata(event: Event) -> Iterator[str]:
    argument = _METADATA.get(event["name"])
    if argument is None or argument not in event.get("args", {}):
        yield "unknown metadata"
    if event["name"].startswith("thread") and type(event.get("tid")) is not int:
        yield "metadata of no thread"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_time(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _unnamed(events: Sequence[Event]) -> Iterator[str]:
    named = {(e["name"], e["pid"], e.get("tid")) for e in events if e["ph"] == "M"}
    processes = {pid for name, pid, _ in named if name == "process_name"}
    for pid, tid in {(e["pid"], e.get("tid")) for e in events if e["ph"] != "M"}:
        if pid not in processes:
            yield f"process {pid} has no name"
        if tid is not None and ("thread_name", pid, tid) not in named:
            yield f"thread {tid} of process {pid} has no name"


def _ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def _spans(events: Sequence[Event]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """By thread, from and to in nanoseconds, the longer one first."""
    threads: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in events:
        if event["ph"] == "X":
            span = (_ns(event["ts"]), _ns(event["ts"]) + _ns(event["dur"]))
            threads.setdefault((event["pid"], event["tid"]), []).append(span)
    for spans in threads.values():
        spans.sort(key=lambda span: (span[0], -span[1]))
    return threads


def _overlaps(events: Sequence[Event]) -> Iterator[str]:
    for thread, spans in _spans(events).items():
        open_until: list[int] = []
        for begin, end in spans:
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            if open_until and open_until[-1] < end:
                yield f"thread {thread}: {begin}-{end} ns overlaps one that ends {open_until[-1]}"
            open_until.append(end)


def _unbalanced(events: Sequence[Event]) -> Iterator[str]:
    depth: Counter[tuple[int, int]] = Counter()
    for event in sorted((e for e in events if e["ph"] in "BE"), key=lambda e: e["ts"]):
        thread = (event["pid"], event["tid"])
        depth[thread] += 1 if event["ph"] == "B" else -1
        if depth[thread] < 0:
            yield f"thread {thread}: an end without a beginning"
    yield from (f"thread {thread}: a beginning without an end" for thread in +depth)


def _loose_arrows(events: Sequence[Event]) -> Iterator[str]:
    spans = _spans(events)
    ends: dict[tuple[str, str, int], Counter[str]] = {}
    for event in events:
        if event["ph"] not in "stf":
            continue
        ends.setdefault((event["cat"], event["name"], event["id"]), Counter())[event["ph"]] += 1
        at = _ns(event["ts"])
        around = spans.get((event["pid"], event["tid"]), [])
        if not any(begin <= at < end for begin, end in around):
            yield f"arrow {event['id']} has no event around its {event['ph']}"
    for arrow, found in ends.items():
        if found["s"] != 1 or found["f"] < 1:
            yield f"arrow {arrow} has {found['s']} beginnings and {found['f']} ends"
