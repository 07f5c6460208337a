"""The lines of steps and requests, the histogram of gaps, energy, and what /proc tells."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from mpipipe.metrics.accounting import StepRecord
from mpipipe.metrics.energy import EnergyMeter
from mpipipe.metrics.gap_histogram import GapHistogram
from mpipipe.metrics.identity import RunIdentity
from mpipipe.metrics.lines import (
    RequestRecord,
    line_start,
    request_line,
    step_line,
)
from mpipipe.metrics.summary import percentile
from mpipipe.topology.usage import COMPUTE_THREAD, Usage, name_thread, read_usage
from mpipipe.types import Completion, FinishReason

IDENTITY = RunIdentity("0123456789ab", 2, "4711", 0, 3, 1)
START = line_start(IDENTITY)
PARTS = ("idle_s", "wait_s", "transfer_s", "compute_s", "overhead_s", "send_s")


def record(start_s: float = 100.0, *, compute_s: float = 0.5) -> StepRecord:
    return StepRecord(
        *(7, 1, 30, 3, start_s, start_s + 0.125, start_s + 0.5, start_s + 1.25, start_s + 1.5),
        steady=False,
        num_sequences=4,
        phase="mixed",
        compute_s=compute_s,
        bytes_in=100,
        bytes_out=200,
    )


def test_the_line_of_a_step_has_its_parts_and_whose_it_is() -> None:
    line = step_line(START, record(), 0.25)
    assert line.endswith("}\n")
    assert json.loads(line) == {
        **IDENTITY.fields(),
        "t_s": 101.5,
        "step": 7,
        "slot": 1,
        "phase": "mixed",
        "num_rows": 4,
        "num_tokens": 30,
        "start_s": 100.0,
        "idle_s": 0.125,
        "wait_s": 0.125,
        "transfer_s": 0.25,
        "compute_s": 0.5,
        "overhead_s": 0.25,
        "send_s": 0.25,
        "bytes_in": 100,
        "bytes_out": 200,
    }


def test_a_transfer_that_is_not_known_is_null_and_counts_as_wait() -> None:
    told = json.loads(step_line(START, record(), None))
    assert (told["wait_s"], told["transfer_s"]) == (0.375, None)


def test_parts_of_a_line_add_up_far_from_the_clocks_origin() -> None:
    told = json.loads(step_line(START, record(8_640_000.123456789), 0.001))
    assert sum(told[part] for part in PARTS) == pytest.approx(
        told["t_s"] - told["start_s"], abs=1e-8
    )


def completion(error_kind: str | None = None) -> Completion:
    return Completion(
        "p1", 4, "text", (5, 6, 7), FinishReason.LENGTH, 9, 0.5, 1.0, 4.0, error_kind=error_kind
    )


def test_the_line_of_a_request_has_its_life() -> None:
    ended = RequestRecord(completion(), 1, 10.0, 10.5, 14.5, 2, (11.0, 12.0, 14.0))
    line = request_line(START, ended, ended.gaps_s(), replica=3, token_times=False)
    assert line.endswith("}\n")
    fields = json.loads(line)
    assert fields == {
        **IDENTITY.fields(),
        "t_s": 14.5,
        "id": "p1",
        "index": 4,
        "on_replica": 3,
        "slot": 1,
        "arrived_s": 10.0,
        "admitted_s": 10.5,
        "first_token_s": 11.0,
        "finished_s": 14.5,
        "queue_s": 0.5,
        "ttft_s": 1.0,
        "latency_s": 4.0,
        "num_prompt_tokens": 9,
        "num_output_tokens": 3,
        "num_preemptions": 2,
        "itl_p50_s": 1.0,
        "itl_p95_s": 2.0,
        "finish_reason": "length",
        "error_kind": None,
    }
    times = request_line(START, ended, ended.gaps_s(), replica=3, token_times=True)
    assert json.loads(times) == {**fields, "token_s": [11.0, 12.0, 14.0]}


def test_the_line_of_a_request_whose_id_needs_escapes_is_one_line() -> None:
    ended = replace(completion(), request_id='a "b"\n\\')
    line = request_line(START, RequestRecord.refused(ended, 3.0), (), token_times=False)
    assert line.count("\n") == 1
    assert json.loads(line)["id"] == ended.request_id


def test_a_refused_prompt_has_no_times_but_its_end() -> None:
    refused = RequestRecord(completion("too_long"), None, None, None, 3.0, 0, ())
    fields = json.loads(request_line(START, refused, (), token_times=True))
    assert fields["error_kind"] == "too_long"
    assert fields["token_s"] == []
    unknown = {name for name, value in fields.items() if value is None}
    unknown -= IDENTITY.fields().keys()
    assert unknown == {
        "slot", "arrived_s", "admitted_s", "first_token_s", "queue_s", "ttft_s", "latency_s",
        "itl_p50_s", "itl_p95_s",
    }  # fmt: skip


@pytest.mark.parametrize("scale_s", [1e-4, 0.02, 30.0])
def test_percentiles_of_the_histogram_are_half_a_percent_off_at_most(scale_s: float) -> None:
    rng = Random(5)
    times_s = [scale_s * math.exp(rng.gauss(0.0, 1.0)) for _ in range(5000)]
    histogram = GapHistogram()
    for first in range(0, 5000, 100):
        histogram.add(times_s[first : first + 100])
    for percent in (1, 50, 95, 99, 100):
        exact = percentile(times_s, percent)
        assert exact is not None
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.00501)


def test_times_outside_the_histogram_are_counted_at_its_bounds() -> None:
    histogram = GapHistogram()
    assert histogram.percentile(50) is None
    histogram.add([0.0, 1e9])
    assert histogram.percentile(50) == pytest.approx(1e-6, rel=0.01)
    assert histogram.percentile(100) == pytest.approx(1e4, rel=0.01)


def test_energy_is_the_counters_difference() -> None:
    meter = EnergyMeter()
    told = [meter.energy_j]
    for t_s, energy_j, power_w in ((0.0, 5000.0, 100.0), (5.0, 5700.0, 500.0)):
        meter.read(t_s, energy_j, power_w)
        told.append(meter.energy_j)
    assert told == [None, 0.0, 700.0]


@pytest.mark.parametrize("power_w", [None, 100.0])
def test_there_is_no_energy_of_one_reading_without_a_counter(power_w: float | None) -> None:
    meter = EnergyMeter()
    meter.read(0.0, None, power_w)
    assert meter.energy_j is None


def test_energy_without_a_counter_is_the_power_over_time() -> None:
    meter = EnergyMeter()
    meter.read(0.0, None, 100.0)
    meter.read(5.0, None, 200.0)
    meter.read(6.0, None, None)  # the card did not answer
    meter.read(10.0, None, 300.0)
    assert meter.energy_j == pytest.approx(750.0 + 1250.0)


def proc(root: Path, *, utime: int, busy: int, idle: int, received: int) -> None:
    """Files as Linux 6.1 has them."""
    own = root / "proc/self"
    own.mkdir(parents=True, exist_ok=True)
    (root / "proc/net").mkdir(exist_ok=True)
    fields = ["R", *["0"] * 10, str(utime), "50", *["0"] * 20]
    (own / "stat").write_text(f"42 (a (strange) name) {' '.join(fields)}\n")
    (own / "statm").write_text("9000 700 300 1 0 600 0\n")
    (own / "io").write_text("rchar: 1\nwchar: 2\nread_bytes: 4096\nwrite_bytes: 512\n")
    for thread, name in (("42", "python"), ("43", "compute")):
        (own / "task" / thread).mkdir(parents=True, exist_ok=True)
        (own / "task" / thread / "comm").write_text(f"{name}\n")
        (own / "task" / thread / "schedstat").write_text(f"9 {thread}500000 3\n")
        (own / "task" / thread / "status").write_text("x:\t1\nnonvoluntary_ctxt_switches:\t7\n")
    (root / "proc/stat").write_text(f"cpu  {busy} 0 0 {idle} 10 0 0 0 7 0\ncpu0 1 2 3 4\n")
    (root / "proc/net/dev").write_text(
        "Inter-|   Receive  |  Transmit\n face |bytes packets|bytes packets\n"
        "    lo: 999 1 0 0 0 0 0 0 999 1 0 0 0 0 0 0\n"
        f"  eth0: {received} 1 0 0 0 0 0 0 70 1 0 0 0 0 0 0\n"
        "  ib0:1000 1 0 0 0 0 0 0 30 1 0 0 0 0 0 0\n"
    )


def test_a_sample_has_the_rates_since_the_reading_before(tmp_path: Path) -> None:
    proc(tmp_path, utime=100, busy=1000, idle=2000, received=5)
    before = read_usage(tmp_path)
    assert before.fields(Usage(), 0.0)["cpu_percent"] is None
    assert before.fields(Usage(), 0.0)["node_cpu_percent"] is None
    proc(tmp_path, utime=400, busy=1500, idle=3500, received=6)
    fields = read_usage(tmp_path).fields(before, 2.0)
    assert fields["cpu_percent"] == 150.0  # 300 ticks of 10 ms
    assert fields["node_cpu_percent"] == 25.0
    assert fields["rss_bytes"] == 700 * 4096
    assert (fields["io_read_bytes"], fields["io_write_bytes"]) == (4096, 512)
    assert (fields["net_rx_bytes"], fields["net_tx_bytes"]) == (1006, 100)
    assert fields["num_involuntary_switches"] == 14
    assert fields["run_delay_s"] == 0.0435, "of the thread that computes"


def test_a_thread_that_takes_the_name_is_the_one_that_computes() -> None:
    assert read_usage().run_delay_s is None
    with ThreadPoolExecutor(1, initializer=name_thread, initargs=(COMPUTE_THREAD,)) as thread:
        delay_s = thread.submit(lambda: read_usage().run_delay_s).result()
    is_told = Path("/proc/self/schedstat").exists()  # not by every kernel
    assert (delay_s is not None) == is_told
    assert delay_s is None or delay_s >= 0


def test_what_proc_does_not_tell_is_null(tmp_path: Path) -> None:
    assert read_usage(tmp_path) == Usage()
    fields = read_usage(tmp_path).fields(Usage(), 5.0)
    assert set(fields.values()) == {None}


def test_this_process_has_used_something() -> None:
    usage = read_usage()
    assert usage.cpu_s is not None
    assert usage.cpu_s > 0
    assert usage.rss_bytes is not None
    assert usage.rss_bytes > 1 << 20
    assert usage.node_busy_s is not None
