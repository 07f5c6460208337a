"""`mpipipe bench throughput`: what was measured, as a table and as one JSON line per timed job."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from mpipipe.bench.figures import number, share, stage_cells
from mpipipe.bench.throughput import ThroughputOptions, run_throughput
from mpipipe.bench.workloads import BenchWork
from mpipipe.clock import MonotonicClock
from mpipipe.errors import MpipipeError, OutputError
from mpipipe.planning.explain import plan_lines
from mpipipe.progress import new_event_loop
from mpipipe.topology.launcher import detect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import JustifyMethod

    from mpipipe.planning.plan import PipelinePlan

__all__ = ["RecordView", "chosen_works", "throughput_command"]

_WIDTH = 140  # of the table where the output is no terminal, as under mpirun
_COLUMNS = (
    "work", "tokens/s", "of floor", "prefill s", "decode s", "round ms", "of floor", "TTFT s",
    "bubble", "steady", "CPU µs/step", "GiB",
)  # fmt: skip


class RecordView:
    """Collects the records and prints the plan, the table and the JSON lines on the head.

    `json_path` gets each JSON line as soon as it is there: a later failure loses none.
    """

    def __init__(self, json_path: Path | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self._json_path = json_path

    def planned(self, plan: PipelinePlan) -> None:
        """Print the plan.

        Raises:
            OutputError: the JSON file cannot be written.
        """
        self._to_file("w", "")
        print("\n".join(plan_lines(plan)), flush=True)

    def measured(self, record: dict[str, Any]) -> None:
        """Keep a record and say one line."""
        self.records.append(record)
        self._to_file("a", json.dumps(record) + "\n")
        print(
            f"{record['work']}: {record['tokens_per_s']:,.1f} tokens/s in "
            f"{record['elapsed_s']:.3f} s",
            flush=True,
        )

    def finish(self) -> None:
        """Print everything."""
        if not self.records:
            return
        console = Console(width=None if sys.stdout.isatty() else _WIDTH)
        print(_title(self.records[0]))
        console.print(_table(self.records))
        print(_boot_line(self.records[0]))
        print("\n".join(map(json.dumps, self.records)), flush=True)

    def _to_file(self, mode: str, text: str) -> None:
        if self._json_path is None:
            return
        try:
            with self._json_path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OutputError(
                f"{self._json_path} cannot be written ({error.strerror}): choose another --json "
                "file"
            ) from error


def chosen_works(words: Sequence[str], default: BenchWork) -> tuple[BenchWork, ...]:
    """The works of `--work`, or the one that the other options describe.

    Raises:
        ConfigError: a work cannot be read.
    """
    return tuple(BenchWork.parse(word) for word in words) or (default,)


def throughput_command(
    config: Path,
    overrides: Sequence[str],
    options: ThroughputOptions,
    *,
    json_path: Path | None,
    debug: bool,
) -> int:
    """Measure on this rank; the head prints. Returns the exit code.

    Raises:
        MpipipeError: on the head, to be shown once; other ranks return its exit code silently.
    """
    clock = MonotonicClock()
    view = RecordView(json_path)
    job = run_throughput(
        config, overrides, options, view, clock, started_s=_process_started_s(clock), debug=debug
    )
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(job)
        view.finish()
    except MpipipeError as error:
        if detect(os.environ).rank in (None, 0) or debug:
            raise
        return error.exit_code
    return 0


def _process_started_s(clock: MonotonicClock) -> float:
    """When this process started, on `clock`: the kernel knows to 10 ms, imports included.

    The kernel counts from boot like the clock, but also while suspended, and a container may hide
    it; then the CPU time used so far must do, which leaves out waiting for files.
    """
    now_s = clock.now_s()
    used_s = time.process_time()
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22, starttime
    except (OSError, ValueError, IndexError):
        return now_s - used_s
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    plausible = used_s - 0.1 <= age_s <= 600.0
    return now_s - (age_s if plausible else used_s)


def _table(records: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in _COLUMNS:
        justify: JustifyMethod = "left" if column == "work" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for record in records:
        table.add_row(*_row(record))
    return table


def _title(record: dict[str, Any]) -> str:
    plan = record["plan"]
    return (
        f"{record['model']}, {plan['dtype']}, {len(plan['split'])} stages {plan['split']} on "
        f"{', '.join(record['devices'])}; {plan['num_slots']} slots of at most "
        f"{plan['max_sequences_per_slot']}; attention {plan['attention']}, transport "
        f"{plan['transport']}, {'CUDA graphs' if plan['cuda_graphs'] else 'no CUDA graphs'}"
    )


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    return (
        record["work"],
        number(record["tokens_per_s"], 1),
        share(record["share_of_floor"]),
        f"{record['prefill_s']:.3f}",
        f"{record['decode_s']:.3f}",
        number(record["ms_per_round"], 3),
        share(record["share_of_decode_floor"]),
        f"{record['ttft_p50_s']:.3f}",
        *stage_cells(record),
    )


def _boot_line(record: dict[str, Any]) -> str:
    boot = record["boot"]
    capture = "" if boot["capture_s"] is None else f" (graphs {boot['capture_s']:.1f} s)"
    return (
        f"Boot: {boot['greet_s']:.1f} s to meet and read · {boot['import_s']:.1f} s to import · "
        f"{boot['load_s']:.1f} s to load{capture} · first token "
        f"{boot['first_token_s']:.1f} s after the process started"
    )
