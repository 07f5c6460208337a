"""What recording costs a step: its times told and taken, its wait divided, its line written.

    python -m tests.benchmarks.recording [--steps 20000] [--rows 32] [--step-ms 2]

The code of a stage between others, without torch and MPI: the account, the times that it tells the
stage behind and gets from the stage before (encoded as over MPI), the lines of the steps in
"recent" mode, and a sample of /proc; on the head also the time of each token and the lines of
requests. Each part is timed by itself, in CPU time of the thread that it delays, and of the one
that writes. Not run by CI: it is measured, not judged.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from mpipipe.clock import MonotonicClock
from mpipipe.control_plane import codec
from mpipipe.control_plane.messages import StepTimes
from mpipipe.metrics.accounting import StageAccount, StepRecord
from mpipipe.metrics.gap_histogram import GapHistogram
from mpipipe.metrics.identity import RunIdentity, new_run_id
from mpipipe.metrics.lines import RequestRecord, line_start, request_line, step_line
from mpipipe.run_folder.line_thread import LineFile, LineThread
from mpipipe.topology.usage import Usage, read_usage
from mpipipe.types import Completion, FinishReason

_BATCH_STEPS = 64
_REPEATS = 5
_STEPS_PER_NAP = 250  # half a second of steps of 2 ms, for which the thread writes once
_SAMPLE_INTERVAL_S = 5.0
_TOKENS = 128  # of a request


def step_of(number: int) -> Any:
    """A decode step."""
    return SimpleNamespace(
        step=number, slot=number % 2, num_tokens=32, num_sampled=32, num_sequences=32,
        phase="decode", steady=True,
    )  # fmt: skip


def booked(account: StageAccount, num_steps: int, after: Callable[[int], None]) -> float:
    """Microseconds of this thread per step to book steps of 2 ms, with `after` behind each."""
    steps = [step_of(number) for number in range(num_steps)]
    account.begin(0.0)
    started_s = time.thread_time()
    for number, step in enumerate(steps):
        start_s = number * 2e-3
        account.step_scheduled(number, start_s)
        account.input_ready(number, start_s + 0.5e-3)
        account.computed(number, start_s + 1.9e-3)
        account.sent(step, start_s + 2e-3, needs=number)
        after(number)
    return (time.thread_time() - started_s) / num_steps * 1e6


def told_and_taken(account: StageAccount) -> Callable[[int], None]:
    """The times of this stage's steps are told, and those of the stage before taken, in batches."""
    batch: list[float] = []

    def after(number: int) -> None:
        batch.append(number * 2e-3 + 0.25e-3)
        if len(batch) == _BATCH_STEPS:
            message = codec.decode(codec.encode(StepTimes(number + 1 - _BATCH_STEPS, tuple(batch))))
            assert isinstance(message, StepTimes)
            account.upstream_computed(message.first_step, [s + 0.0 for s in message.computed_s])
            batch.clear()

    return after


def written(folder: Path, records: list[tuple[StepRecord, float | None]]) -> tuple[float, float]:
    """Microseconds per step: of the thread that tells, and of the process with the writing one."""
    start = line_start(RunIdentity(new_run_id(), 1, "4711", 0, 3, 1))

    def line_of(told: tuple[StepRecord, float | None]) -> str:
        return step_line(start, *told)

    file = LineFile(folder / "steps_rank_3.jsonl", line_of, num_kept=4096)
    thread = LineThread((file,), clock=MonotonicClock())
    thread.start()
    own_s, all_s = time.thread_time(), time.process_time()
    for place, told in enumerate(records):
        file.tell(told)
        if place % _STEPS_PER_NAP == 0:
            time.sleep(0.01)
    own_s = time.thread_time() - own_s
    thread.close(60.0)
    all_s = time.process_time() - all_s
    return own_s / len(records) * 1e6, all_s / len(records) * 1e6


def sampled_us() -> float:
    """Microseconds of one sample of /proc."""
    started_s = time.process_time()
    for _ in range(200):
        read_usage().fields(Usage(), 0.0)
    return (time.process_time() - started_s) / 200 * 1e6


def token_us(num_rows: int) -> tuple[float, float]:
    """Microseconds per token: to keep its time, and for its request's line and histogram."""
    lists: dict[int, list[float]] = {row: [] for row in range(num_rows)}
    started_s = time.process_time()
    for number in range(_TOKENS):
        now_s = number * 0.02
        for row in range(num_rows):
            lists[row].append(now_s)
    kept_us = (time.process_time() - started_s) / num_rows / _TOKENS * 1e6
    histogram = GapHistogram()
    start = line_start(RunIdentity(new_run_id(), 1, "4711", 0, 3, 1))
    completion = Completion("p", 0, "", (1,) * _TOKENS, FinishReason.LENGTH, 9, 0.1, 0.2, 3.0)
    started_s = time.process_time()
    for times in lists.values():
        record = RequestRecord(completion, 0, 0.0, 0.0, 3.0, 0, tuple(times))
        histogram.add(gaps_s := record.gaps_s())
        request_line(start, record, gaps_s, token_times=False)
    return kept_us, (time.process_time() - started_s) / num_rows / _TOKENS * 1e6


def main() -> None:
    """Measure and print medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=2.0)
    asked = parser.parse_args()
    figures: dict[str, list[float]] = {}
    for _ in range(_REPEATS):
        plain = booked(StageAccount(1), asked.steps, lambda _: None)
        account = StageAccount(1)
        records: list[tuple[StepRecord, float | None]] = []
        account.on_step = lambda record, transfer_s, records=records: records.append(
            (record, transfer_s)
        )
        divided = booked(account, asked.steps, told_and_taken(account))
        with tempfile.TemporaryDirectory() as name:
            tell, all_of_it = written(Path(name), records)
        keep, line = token_us(asked.rows)
        steps_per_sample = _SAMPLE_INTERVAL_S / asked.step_ms * 1e3
        found = {
            "the account alone, as before": plain,
            "+ times told, taken, wait divided": divided - plain,
            "+ line told to the thread": tell,
            "= delays the step": divided - plain + tell,
            "line made and written (thread)": all_of_it - tell,
            "sample of /proc (thread)": sampled_us() / steps_per_sample,
            f"head: times of {asked.rows} tokens": keep * asked.rows,
            f"head: lines of requests, {asked.rows} tokens (thread)": line * asked.rows,
        }
        for what, us in found.items():
            figures.setdefault(what, []).append(us)
    for what, values in figures.items():
        us = median(values)
        print(f"{what:<48}{us:7.2f} us/step {us / asked.step_ms / 10:6.2f} %")
    recorded = [what for what in figures if what[0] != "+" and "alone" not in what]
    total_us = sum(median(figures[what]) for what in recorded)
    percent = total_us / asked.step_ms / 10
    print(f"{'all of it, on the head':<48}{total_us:7.2f} us/step {percent:6.2f} %")


if __name__ == "__main__":
    main()
