"""`mpipipe bench …`: the control plane's messages, throughput, and the rival's for comparison.

What was measured is printed as a table and as one JSON line per timed job.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from mpipipe.bench.baseline import (
    BaselinePlace,
    BaselineResult,
    generate_with_transformers,
    open_baseline,
    time_with_transformers,
)
from mpipipe.bench.control import measure_control_plane
from mpipipe.bench.environment import SPEED_PACKAGES
from mpipipe.bench.figures import number, share, stage_cells
from mpipipe.bench.throughput import ThroughputOptions, run_throughput
from mpipipe.bench.workloads import BenchWork, bench_requests
from mpipipe.checkpoint.vocabulary import Vocabulary
from mpipipe.clock import MonotonicClock
from mpipipe.config.load import load_config
from mpipipe.config.prompts import configured_prompts
from mpipipe.control_plane.probe import format_probe
from mpipipe.errors import ConfigError, MpipipeError, OutputError
from mpipipe.planning.explain import plan_lines
from mpipipe.planning.model_facts import read_model
from mpipipe.progress import run_async
from mpipipe.run_folder.files import prepare_run_folder
from mpipipe.run_folder.journal import CompletionWriter, merge
from mpipipe.runtime.requests import tokenize
from mpipipe.topology.launcher import detect
from mpipipe.topology.packages import package_versions
from mpipipe.topology.process import process_age_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import JustifyMethod

    from mpipipe.config.load import LoadedConfig
    from mpipipe.planning.plan import PipelinePlan

__all__ = [
    "RecordView",
    "control_command",
    "throughput_command",
    "transformers_command",
    "transformers_works_command",
]

_WIDTH = 140  # of the table where the output is no terminal, as under mpirun
_COLUMNS = (
    "work", "tokens/s", "of floor", "prefill s", "decode s", "round ms", "of floor", "TTFT s",
    "bubble", "steady", "CPU µs/step", "GiB",
)  # fmt: skip


def control_command(*, debug: bool) -> int:
    """Measure messages between the ranks of this launch; the head prints a table.

    Raises:
        MpipipeError: fewer than two ranks, or MPI is not as needed.
    """
    probe = run_async(measure_control_plane(MonotonicClock(), debug=debug))
    if probe is not None:
        rows = [("", "mpipipe", "plain mpi4py"), *format_probe(probe)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for row in rows:
            print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    return 0


def transformers_command(
    config_path: Path, overrides: Sequence[str], place: BaselinePlace, *, batch_size: int
) -> None:
    """Run the configured prompts through `transformers.generate` and print its throughput.

    Completions go to `output.dir` when it is set, in the form of a run's.

    Raises:
        MpipipeError: what `mpipipe run` would refuse.
    """
    place.check()
    model = read_model(load_config(config_path, overrides))
    loaded = model.loaded
    config = loaded.config
    lines = configured_prompts(loaded)
    if config.generation.temperature > 0:
        raise ConfigError(
            "bench transformers decodes greedily, so that tokens can be compared: set "
            "generation.temperature=0"
        )

    folder = Path(config.output.dir).absolute() if config.output.dir != "auto" else None
    if folder is not None:
        prepare_run_folder(folder, overwrite=config.output.overwrite)
    prepared = tokenize(model, lines)
    tokenizer, prompts = prepared.tokenizer, prepared.prompts
    assert tokenizer is not None, "tokenised with it"
    result = generate_with_transformers(
        model.folder,
        prompts.requests,
        dtype=_dtype(loaded),
        batch_size=batch_size or max(1, len(prompts.requests)),
        decode=tokenizer.decode,
        place=place,
        random=config.model.weights == "random",
    )
    print(_result_line(result, place))
    if folder is not None:
        completions = (*prompts.rejected, *result.completions)
        with CompletionWriter(folder, 0) as writer:
            writer.write(*completions)
        index_of = {completion.request_id: completion.index for completion in completions}
        print(f"Completions in {merge(folder, index_of, writer.written)}")


def transformers_works_command(
    config_path: Path,
    overrides: Sequence[str],
    words: Sequence[str],
    place: BaselinePlace,
    *,
    batch_size: int,
) -> None:
    """Time works of random tokens with transformers; prints one JSON line for each.

    Raises:
        MpipipeError: a wrong option, setting or model folder, or no GPU.
    """
    place.check()
    works = [BenchWork.parse(word) for word in words]
    loaded = load_config(config_path, overrides)
    facts = read_model(loaded)

    dtype = _dtype(loaded)
    random = loaded.config.model.weights == "random"
    model = open_baseline(facts.folder, dtype, place, random=random)
    # A None among generate's arguments does not win over the model's own generation settings.
    model.generation_config.eos_token_id = None
    vocabulary = Vocabulary.of(facts.folder, facts.spec)
    for work in works:
        requests = bench_requests(work, vocabulary, seed=0)
        record = {
            "peer": "transformers",
            "place": place.text,
            "work": work.name,
            **time_with_transformers(model, requests, batch_size=batch_size or work.num_prompts),
            "model": facts.folder.name,
            "dtype": dtype,
            "batch_size": batch_size or work.num_prompts,
            "versions": package_versions(SPEED_PACKAGES),
        }
        print(json.dumps(record), flush=True)


def _dtype(loaded: LoadedConfig) -> str:
    dtype = loaded.config.model.dtype
    return "float32" if dtype == "auto" else dtype


def _result_line(result: BaselineResult, place: BaselinePlace) -> str:
    return (
        f"transformers.generate: {len(result.completions)} prompts, "
        f"{result.num_output_tokens} output tokens in {result.generate_s:.2f} s, "
        f"{result.tokens_per_s:.1f} tokens/s on {place.text} "
        f"(load {result.load_s:.1f} s)"
    )


# ---- throughput ----------------------------------------------------------------------------------


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
        run_async(job)
        view.finish()
    except MpipipeError as error:
        if detect(os.environ).rank in (None, 0) or debug:
            raise
        return error.exit_code
    return 0


def _process_started_s(clock: MonotonicClock) -> float:
    """When this process started, on `clock`, imports included.

    Where the kernel does not tell, the CPU time used so far must do, which leaves out waiting for
    files.
    """
    age_s, used_s = process_age_s(), time.process_time()
    if age_s is None or not used_s - 0.1 <= age_s <= 600.0:
        age_s = used_s
    return clock.now_s() - age_s


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
