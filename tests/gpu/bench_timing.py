"""What the kernel benches share: the report, and times of calls inside a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch

PAGE_SIZE = 16
DTYPE = torch.bfloat16
Call = Callable[[], object]


@dataclass
class Report:
    """Results by table, printed as they come and once more at the end."""

    started: float = field(default_factory=time.perf_counter)
    copy_bandwidth: float = 0.0  # bytes per second
    rows: dict[str, list[dict[str, object]]] = field(default_factory=dict)

    def add(self, table: str, **row: object) -> None:
        self.rows.setdefault(table, []).append(row)
        print(f"{time.perf_counter() - self.started:6.1f}s {table}: {text_of(row)}", flush=True)

    def print_tables(self) -> None:
        for table, rows in self.rows.items():
            print(f"\n== {table}")
            for row in rows:
                print("  " + text_of(row))
        print(f"\n{time.perf_counter() - self.started:.0f} s")


def text_of(row: dict[str, object]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
    )


def time_us(calls: list[Call], replays: int = 7, least_calls: int = 20) -> float:
    """Median microseconds of one call, called in turn inside one CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = max(1, -(-least_calls // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return elapsed_us(graph.replay, replays) / (rounds * len(calls))


def attempt(
    report: Report, table: str, label: str, measure: Callable[[], dict[str, object]]
) -> float:
    """Add what `measure` says, or one line about why it failed; returns its time in us."""
    try:
        row = measure()
    except Exception as error:
        torch.cuda.synchronize()
        first_line = (str(error).strip().splitlines() or [""])[0][:160]
        report.add(table, what=label, failed=f"{type(error).__name__}: {first_line}")
        return float("inf")
    report.add(table, what=label, **row)
    us = row["us"]
    assert isinstance(us, float)
    return us


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def poison() -> None:
    """Leave NaN in the memory that the next outputs get from the allocator."""
    blocks = [
        torch.full((size,), float("nan"), device="cuda") for size in (1 << 10, 1 << 16, 1 << 22)
    ]
    del blocks


def copy_bandwidth() -> float:
    """Bytes read and written per second by the fastest of two ways to copy 4 GiB.

    Not in a graph: copies there become memcpy nodes, which the copy engines do at two thirds of it.
    """
    source = torch.ones(1 << 29, dtype=torch.int64, device="cuda")
    target = torch.empty_like(source)
    num_bytes = 2 * source.numel() * source.element_size()
    ways: list[Call] = [
        lambda: target.copy_(source),
        lambda: torch.bitwise_not(source, out=target),
    ]
    return max(num_bytes / elapsed_us(way) * 1e6 for way in ways)


def elapsed_us(call: Call, repeats: int = 7) -> float:
    """Median microseconds of one call on the stream, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        begin, end = (
            torch.Event("cuda", enable_timing=True),
            torch.Event("cuda", enable_timing=True),
        )
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return float(median(times))
