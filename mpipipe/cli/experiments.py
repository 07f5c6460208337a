"""`mpipipe bench strong | weak | batch | arrangements`: whole runs compared, and what they say."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from mpipipe.config.load import load_config
from mpipipe.errors import EXIT_OK, EXIT_PROMPTS, ConfigError, StoppedError
from mpipipe.experiments.best import best_config
from mpipipe.experiments.folder import ExperimentFolder
from mpipipe.experiments.launch import choose_launcher, run_launch
from mpipipe.experiments.matrix import ExperimentOptions
from mpipipe.experiments.run import Launching, missing_slots, run_experiment
from mpipipe.experiments.setup import experiment_matrix, possible_arrangements
from mpipipe.experiments.slurm_jobs import job_scripts, submit
from mpipipe.experiments.verdict import CaseVerdict, ExperimentVerdict, judge
from mpipipe.plain_values import to_json
from mpipipe.report.numbers import count
from mpipipe.run_folder.files import write_whole
from mpipipe.topology.host import usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpipipe.experiments.record import ExperimentName, Matrix, Record, RunSlot

__all__ = ["ExperimentRequest", "experiment_command"]

_WIDTH = 170  # of the table where no terminal says otherwise
_DEFAULT_STAGES = {"strong": "1,2", "weak": "1,2", "batch": "1"}
_DEFAULT_RANKS = 2  # of arrangements


@dataclass(frozen=True, slots=True)
class ExperimentRequest:
    """The options of the command, as typed."""

    experiment: ExperimentName
    config: Path
    words: tuple[str, ...]
    out: Path
    stages: str = ""
    nodes: str = ""
    batch: str = ""
    replicas: int = 1
    tensor_parallel: int = 1
    num_ranks: int = 0  # of arrangements; 0: not given
    num_prompts: int = 0
    prompt_tokens: int = 0
    repeat: int = 5
    seed: int = 0
    timeout_s: float = 600.0
    keep_runs: bool = False
    as_json: bool = False
    sbatch: bool = False
    sbatch_options: tuple[str, ...] = ()
    only_case: str = ""
    only_table: bool = False


def experiment_command(request: ExperimentRequest) -> int:
    """Run what is missing of the experiment, or submit it, and say what it shows.

    Returns:
        0 if every cell has a result and the tokens of each case agree, else 4.

    Raises:
        MpipipeError: the request is wrong, another experiment is in the folder, or no rank starts.
    """
    options = _options(request)
    folder = ExperimentFolder(request.out.absolute())
    is_local = not (request.sbatch or os.environ.get("SLURM_JOB_ID"))
    matrix = experiment_matrix(
        folder,
        request.config,
        request.words,
        options,
        _command(request, options),
        # A rank alone on the host would else take the cores of those that it is compared with.
        threads=max(1, usable_cores() // _most_ranks(options)) if is_local else None,
    )
    if request.only_case and request.only_case not in {case.name for case in matrix.cases}:
        raise ConfigError(
            f"--case {request.only_case}: the cases are "
            f"{', '.join(case.name for case in matrix.cases)}"
        )
    if request.sbatch:
        return _submit(request, folder, matrix)
    if not request.only_table:
        ranks_per_node = {-(-case.num_ranks // case.num_nodes) for case in matrix.cases}
        launcher = choose_launcher(os.environ, equal_cores=len(ranks_per_node) > 1)
        launching = Launching(launcher, run_launch, request.only_case, request.keep_runs)
        with _ended_by_signals():
            run_experiment(
                folder, matrix, launching, _View(sys.stderr if request.as_json else None)
            )
    return _conclude(request, folder, matrix)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While inside, SIGTERM and SIGHUP end the launch that runs, then the command, with code 75.

    A SIGHUP that is ignored, as nohup sees to it, stays so.
    """
    earlier = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    if earlier[signal.SIGHUP] == signal.SIG_IGN:
        del earlier[signal.SIGHUP]
    for number in earlier:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _stop(_signal: int, _frame: object) -> NoReturn:
    raise StoppedError("told to stop: give the same command again to go on")


def _most_ranks(options: ExperimentOptions) -> int:
    return max(place.ranks for place in options.places)


def _options(request: ExperimentRequest) -> ExperimentOptions:
    _check_cut(request)
    each = request.replicas * request.tensor_parallel
    cuts: tuple[tuple[int, int, int], ...] = ()
    if request.experiment == "arrangements":
        num_ranks = request.num_ranks or _DEFAULT_RANKS
        cuts = possible_arrangements(request.config, request.words, num_ranks)
        stages, ranks = tuple(cut[1] for cut in cuts), (num_ranks,) * len(cuts)
    else:
        stages = _numbers("--stages", request.stages or _DEFAULT_STAGES[request.experiment])
        ranks = tuple(each * number for number in stages)
    nodes = _numbers("--nodes", request.nodes) if request.nodes else _default_nodes(ranks)
    if len(nodes) == 1:
        nodes *= len(stages)
    return ExperimentOptions(
        replicas=request.replicas,
        lanes=request.tensor_parallel,
        arrangements=cuts,
        experiment=request.experiment,
        stages=stages,
        nodes=nodes,
        batches=_numbers("--batch", request.batch) if request.batch else (),
        num_prompts=request.num_prompts,
        prompt_tokens=request.prompt_tokens,
        repeat=request.repeat,
        seed=request.seed,
        timeout_s=request.timeout_s,
    )


def _check_cut(request: ExperimentRequest) -> None:
    """The options that say how ranks are cut are those of the experiment."""
    given = {"--stages": request.stages != "", "--replicas": request.replicas > 1}
    given["--tensor-parallel"] = request.tensor_parallel > 1
    if request.experiment != "arrangements":
        given = {"--ranks": request.num_ranks > 0}
    if stray := [name for name, is_given in given.items() if is_given]:
        takes = "--stages, --replicas and --tensor-parallel" if "--ranks" in stray else "--ranks"
        raise ConfigError(f"{stray[0]}: the {request.experiment} experiment takes {takes}")


def _default_nodes(ranks: Sequence[int]) -> tuple[int, ...]:
    """As many as the allocation has, and no node without a rank."""
    available = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    return tuple(min(number, int(available)) for number in ranks)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option} {text}: give whole numbers from 1, with commas: 1,2,4")
    return numbers


def _command(request: ExperimentRequest, options: ExperimentOptions) -> tuple[str, ...]:
    """The words that make or continue the same experiment, wherever it runs."""
    lists = {
        "--stages": options.stages,
        "--nodes": options.nodes,
        "--batch": options.batches,
        "--replicas": (options.replicas,),
        "--tensor-parallel": (options.lanes,),
    }
    if options.arrangements:
        lists = {"--ranks": (_most_ranks(options),), "--nodes": options.nodes[:1]}
        lists["--batch"] = options.batches
    flags = [f"{name}={','.join(map(str, numbers))}" for name, numbers in lists.items() if numbers]
    return (
        sys.executable, "-m", "mpipipe", "bench", request.experiment, str(request.config),
        *request.words, *flags, f"--prompts={request.num_prompts}",
        f"--prompt-tokens={request.prompt_tokens}", f"--repeat={request.repeat}",
        f"--seed={request.seed}", f"--timeout={request.timeout_s:g}",
        f"--out={request.out.absolute()}", *(["--keep-runs"] if request.keep_runs else []),
    )  # fmt: skip


def _submit(request: ExperimentRequest, folder: ExperimentFolder, matrix: Matrix) -> int:
    missing = list(dict.fromkeys(slot.case for slot in missing_slots(folder, matrix)))
    arrays, last = job_scripts(matrix, folder.path, matrix.command, missing)
    options = [word for text in request.sbatch_options for word in shlex.split(text)]
    ids, last_id = submit(arrays, last, folder.path, options)
    tasks = f"{len(missing)} tasks in the arrays {', '.join(ids)}" if ids else "nothing to run"
    print(f"Submitted: {tasks}; job {last_id} follows and makes the report in {folder.path}")
    return EXIT_OK


def _conclude(request: ExperimentRequest, folder: ExperimentFolder, matrix: Matrix) -> int:
    verdict = judge(matrix, folder.records())
    if verdict.best is not None and not verdict.num_missing:
        is_file = bool(load_config(request.config, ()).sources)
        base = request.config if is_file else None
        text = best_config(matrix, verdict, folder.best_path, extends=base)
        if text is not None:
            write_whole(folder.best_path, text.encode())
    if request.as_json:
        print(to_json(verdict, indent=2))
    else:
        _print_verdict(matrix, verdict, folder)
    if request.only_case:
        cases = [case for case in verdict.cases if case.case.name == request.only_case]
        return EXIT_OK if all(case.is_valid for case in cases) else EXIT_PROMPTS
    return EXIT_OK if verdict.is_sound else EXIT_PROMPTS


class _View:
    """A line for each launch."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._num_cells = 0

    def planned(self, matrix: Matrix, num_missing: int) -> None:
        """How much there is to do."""
        self._num_cells = num_missing
        self._print(
            f"{matrix.experiment}: {count(len(matrix.cases), 'case')}, "
            f"{count(matrix.repeat, 'repeat')}; "
            f"{num_missing} of {len(matrix.order)} launches are missing"
        )

    def launching(self, slot: RunSlot) -> None:
        """Of a warm-up, which has no result."""
        if not slot.repeat:
            self._print(f"warm-up, not measured: {slot.case}")

    def measured(self, record: Record, num_left: int) -> None:
        """What came out."""
        speed = record.tokens_per_s
        told = f"{record.outcome}: {record.reason}"
        if speed is not None:
            phases = (record.metrics or {}).get("phases") or {}
            told = f"{speed:,.1f} tokens/s, {phases.get('generate_s', 0.0):.1f} s generating"
        flags = f" ({', '.join(record.flags)})" if record.flags else ""
        place = f"[{self._num_cells - num_left}/{self._num_cells}]"
        self._print(
            f"{place} {record.case.name}, repeat {record.repeat}: {told}, "
            f"{record.wall_s:.1f} s in all{flags}"
        )

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False)


_COLUMNS = (
    "case", "R × S × L", "nodes", "batch", "prompts", "n", "tokens/s", "interval", "CV %",
    "speedup", "efficiency", "allowed", "J/token", "flags",
)  # fmt: skip


def _print_verdict(matrix: Matrix, verdict: ExperimentVerdict, folder: ExperimentFolder) -> None:
    is_terminal = sys.stdout.isatty()
    console = Console(highlight=False, width=None if is_terminal else _WIDTH)
    table = Table(*_COLUMNS, box=box.SIMPLE_HEAD)
    table.columns[0].no_wrap = table.columns[-1].no_wrap = True
    table.columns[0].min_width = max(len(case.case.name) for case in verdict.cases)
    for column in table.columns[1:-1]:
        column.justify = "right"
    for case in verdict.cases:
        table.add_row(*_cells(case))
    console.print(table)
    console.print("R × S × L: replicas × stages × lanes (ranks of a stage)", markup=False)
    for note in verdict.notes:
        console.print(note, markup=False)
    if verdict.best is not None and folder.best_path.exists():
        console.print(f"Written: {folder.best_path}", markup=False)
    if verdict.num_missing:
        console.print(
            f"{verdict.num_missing} of {len(matrix.order)} launches are missing: give the same "
            "command again",
            markup=False,
        )


def _cells(verdict: CaseVerdict) -> list[str]:
    case, speed = verdict.case, verdict.speed
    flags: list[str] = list(verdict.flags)
    if verdict.outcome != "ok":
        flags.insert(0, verdict.outcome or "incomplete")
    return [
        case.name,
        case.arrangement,
        str(case.num_nodes),
        "memory" if case.batch is None else str(case.batch),
        str(case.num_prompts),
        str(verdict.num_ok),
        "–" if speed is None else f"{speed.median:,.1f}",
        "–" if speed is None else f"{speed.low:,.1f} to {speed.high:,.1f}",
        "–" if speed is None or speed.cv is None else f"{100 * speed.cv:.1f}",
        _number(verdict.speedup.median if verdict.speedup and verdict.is_comparable else None),
        _number(verdict.efficiency if verdict.is_comparable else None),
        _number(verdict.ceiling_speedup),
        _number(verdict.joules_per_token),
        ", ".join(flags),
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
