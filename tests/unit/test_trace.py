from __future__ import annotations

import json

from mpipipe.metrics.accounting import StepRecord
from mpipipe.metrics.trace import last_steady, trace_document


def record(step: int, start_s: float, *, steady: bool = True, prompt: bool = False) -> StepRecord:
    return StepRecord(
        step=step,
        slot=step % 2,
        num_tokens=16 if prompt else 4,
        num_sampled=4,
        start_s=start_s,
        scheduled_s=start_s + 0.001,
        input_ready_s=start_s + 0.003,
        compute_end_s=start_s + 0.010,
        send_end_s=start_s + 0.010,
        steady=steady,
    )


def test_a_step_becomes_one_event_per_part_that_took_time() -> None:
    document = trace_document({0: [record(3, 5.0)]}, names={0: "stage 0"}, offsets_s={})
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    spans = {event["cat"]: (event["ts"], event["dur"]) for event in events}
    assert spans == {
        "idle": (0.0, 1000.0),
        "wait for input": (1000.0, 2000.0),
        "compute": (3000.0, 7000.0),
    }
    assert len({event["tid"] for event in events}) == 3
    assert events[0]["args"] == {
        "step": 3,
        "slot": 1,
        "rows": 4,
        "sampled": 4,
        "steady": True,
    }


def test_every_rank_is_a_named_process_with_named_tracks() -> None:
    records = {1: [record(0, 1.0)], 0: [record(0, 1.0)]}
    document = trace_document(records, names={0: "first", 1: "second"}, offsets_s={})
    names = [e for e in document["traceEvents"] if e["name"] == "process_name"]
    assert [(e["pid"], e["args"]["name"]) for e in names] == [(0, "first"), (1, "second")]
    tracks = [e for e in document["traceEvents"] if e["name"] == "thread_name" and e["pid"] == 0]
    assert len(tracks) == 4
    json.dumps(document)


def test_clocks_are_put_on_the_heads() -> None:
    records = {0: [record(0, 10.0)], 1: [record(0, 110.5)]}
    document = trace_document(records, names={0: "a", 1: "b"}, offsets_s={1: 100.0})
    starts = {e["pid"]: e["ts"] for e in document["traceEvents"] if e.get("cat") == "idle"}
    assert starts == {0: 0.0, 1: 500_000.0}


def test_no_records_make_an_empty_trace() -> None:
    document = trace_document({0: []}, names={0: "a"}, offsets_s={})
    assert not [event for event in document["traceEvents"] if event["ph"] == "X"]


def test_the_last_steady_steps_are_taken_or_else_the_last_decodes() -> None:
    prompt = record(0, 0.0, steady=False, prompt=True)
    steady = [record(i, float(i)) for i in range(1, 6)]
    tail = record(6, 6.0, steady=False)
    assert last_steady([prompt, *steady, tail], 2) == steady[-2:]
    never = [record(i, float(i), steady=False) for i in range(1, 4)]
    assert last_steady([prompt, *never], 5) == never
