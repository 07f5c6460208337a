"""`mpipipe plan`: the plan and its forecast for ranks of this machine's kind, or of another one.

Nothing is started, and neither torch nor MPI is needed: it runs on a login node.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe.bench.workloads import BenchWork
from mpipipe.checkpoint.index import holds_weights
from mpipipe.cli.plan_view import answer_lines, arrangement_lines, refusal_lines
from mpipipe.config.byte_sizes import parse_bytes
from mpipipe.config.load import load_config
from mpipipe.config.prompts import configured_prompts
from mpipipe.config.schema import AUTO
from mpipipe.errors import (
    EXIT_CONFIG,
    EXIT_OK,
    ConfigError,
    MpipipeError,
    PlanError,
    RankCountError,
)
from mpipipe.plain_values import to_json
from mpipipe.planning.advice import advise, what_fits
from mpipipe.planning.arrangements import compare_arrangements
from mpipipe.planning.bottleneck import bottleneck_of
from mpipipe.planning.devices import least_capable, needed_dtype
from mpipipe.planning.explain import plan_lines
from mpipipe.planning.gpu_table import GpuTable, known_gpus, read_gpu_table
from mpipipe.planning.known_times import known_times
from mpipipe.planning.learnt import learn
from mpipipe.planning.link_table import link_named
from mpipipe.planning.machine import DescribedMachine, described_ranks, parse_gpus
from mpipipe.planning.model_facts import ModelFacts, model_folder, read_model
from mpipipe.planning.plan import Resolved
from mpipipe.planning.planned_job import Outlook, PlannedJob
from mpipipe.planning.prompt_lengths import PromptLengths, prompt_lengths
from mpipipe.planning.resolve import deepspeed_warnings
from mpipipe.planning.resources import RankResources, read_rank_resources
from mpipipe.topology.gpu import (
    GpuFacts,
    driver_in_sight,
    gpu_of_rank,
    no_driver_problem,
)
from mpipipe.topology.launcher import Launcher
from mpipipe.topology.nvml import query_host
from mpipipe.topology.packages import installed_attention_backends

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.config.load import LoadedConfig

__all__ = ["PlanRequest", "plan_command", "ranks_of_this_host"]

# Where the configuration names no prompts, as far as the context holds them.
_ASSUMED_PROMPTS, _ASSUMED_TOKENS, _ASSUMED_OUTPUT = 512, 512, 128
_STANDARD_INPUT = "-"


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the command line asks for; None: not asked."""

    num_stages: int | None = None
    gpus: str | None = None  # e.g. "h100, 3 x t4"; None: this machine
    num_nodes: int | None = None
    link: str | None = None
    host_memory: str | None = None
    gpu_table: Path | None = None
    work: str | None = None  # prompts instead of the configuration's, e.g. 512x512x128
    past_run: Path | None = None  # to learn from
    with_reasons: bool = False
    compares: bool = False  # stages, lanes and replicas
    as_json: bool = False


def plan_command(config: Path, overrides: Sequence[str], request: PlanRequest) -> int:
    """Print the plan that the ranks would agree on, and what it will take; returns the exit code.

    Without `num_stages` and `gpus`: for as many ranks of this host as the configuration asks for,
    or one.

    Raises:
        MpipipeError: what `mpipipe run` would refuse before it reads weights, but for a plan that
            does not fit: that is answered, and the code is 2.
    """
    loaded = load_config(config, overrides)
    model, warnings = _model(loaded)
    job, where, ignored = _job(model, request)
    if request.past_run is not None:
        job = _learnt(job, request.past_run)
    _warn(*loaded.warnings, *warnings, *ignored)
    try:
        outlook = job.outlook()
    except (PlanError, RankCountError) as error:
        return _refused(job, error, where, request)
    _warn(*deepspeed_warnings(loaded, outlook.plan))
    return _answered(outlook, where, request)


def _learnt(job: PlannedJob, place: Path) -> PlannedJob:
    """`job` with what the run at `place` teaches.

    Raises:
        ConfigError: that run had another model, or computed it in another form.
        OutputError: there is no run that has ended.
    """
    from mpipipe.logs.past_run import read_past_run

    run = read_past_run(place)
    spec, plan = job.spec, run.plan
    asked = job.config.model.dtype
    wanted = {
        "model": (spec.model_type, spec.num_layers, spec.hidden_size),
        "model.dtype": plan.dtype if asked == AUTO else asked,
    }
    was = {
        "model": (plan.model_type, plan.num_layers, plan.hidden_size),
        "model.dtype": plan.dtype,
    }
    for name, value in wanted.items():
        if was[name] != value:
            raise ConfigError(
                f"--from {run.name}: that run had {name} {was[name]}, and this plan has {value}; "
                "its times say nothing of that: give a run of the same model in the same dtype"
            )
    return replace(job, learnt=learn(spec, run, known_times(spec, plan, run.ranks)))


def _answered(outlook: Outlook, where: str, request: PlanRequest) -> int:
    """The answer where it fits."""
    bottleneck, advice, forecast = bottleneck_of(outlook), advise(outlook), outlook.forecast
    ways = compare_arrangements(outlook.job) if request.compares else ()
    if request.as_json:
        _print_json(
            {
                "fits": True,
                "machine": where,
                "prompts": _prompts_record(outlook.job.prompts),
                "plan": outlook.plan,
                "replicas": [{"replica": p.replica, "ranks": p.ranks} for p in outlook.plans],
                "forecast": forecast,
                "wall_clock_s": forecast.wall_clock_s,
                "bottleneck": bottleneck,
                "advice": advice,
                "arrangements": ways,
            }
        )
        return EXIT_OK
    lines = answer_lines(outlook, bottleneck, advice, where)
    if request.with_reasons or request.gpus is None:
        lines = [*plan_lines(outlook.plan), "", *lines]
    print("\n".join([*lines, *arrangement_lines(ways)]))
    return EXIT_OK


def _refused(job: PlannedJob, error: MpipipeError, where: str, request: PlanRequest) -> int:
    """The answer where nothing fits."""
    fitting = what_fits(job)
    ways = compare_arrangements(job) if request.compares else ()
    if request.as_json:
        _print_json(
            {
                "fits": False,
                "machine": where,
                "prompts": _prompts_record(job.prompts),
                "problem": str(error),
                "would_fit": fitting,
                "arrangements": ways,
            }
        )
    else:
        lines = refusal_lines(job, str(error), fitting, where)
        print("\n".join([*lines, *arrangement_lines(ways)]))
    return EXIT_CONFIG


def _print_json(record: dict[str, Any]) -> None:
    print(to_json(record, indent=2))


def _prompts_record(prompts: PromptLengths) -> dict[str, Any]:
    return {
        "num_prompts": len(prompts.lengths),
        "num_rejected": prompts.num_rejected,
        "num_prompt_tokens": sum(prompt for prompt, _ in prompts.lengths),
        "num_output_tokens": sum(output for _, output in prompts.lengths),
        "source": prompts.source,
    }


def _warn(*warnings: str) -> None:
    for warning in warnings:
        print(f"mpipipe: warning: {warning}", file=sys.stderr)


# ---- what is planned -----------------------------------------------------------------------------


def _job(model: ModelFacts, request: PlanRequest) -> tuple[PlannedJob, str, tuple[str, ...]]:
    """The job, where it is to run, and what of the configuration is not used for that."""
    loaded = model.loaded
    ignored: tuple[str, ...] = ()
    needs: tuple[Resolved, ...] = ()
    table = known_gpus() if request.gpu_table is None else read_gpu_table(request.gpu_table)
    machine = _machine(request, table)
    if machine is None:
        ranks, where = _ranks_here(loaded, request), "this machine"
    else:
        ranks, where = described_ranks(machine), machine.words
        loaded, ignored, needs = _for_described(loaded, ranks)
    job = PlannedJob(
        config=loaded.config,
        spec=model.spec,
        ranks=tuple(ranks),
        model_path=str(model.folder),
        prompts=_prompts(loaded, model, request),
        notes=(*model.notes, *needs),
        table=table,
    )
    if machine is not None and machine.num_nodes > 1:
        job = replace(job, far=machine.link)
    elif machine is not None and request.link is not None:
        job = replace(job, near=machine.link)
    return job, where, ignored


def _model(loaded: LoadedConfig) -> tuple[ModelFacts, tuple[str, ...]]:
    """The model, also where its folder holds a `config.json` and no weights yet."""
    folder = model_folder(loaded)
    is_random = loaded.config.model.weights == "random"
    if is_random or holds_weights(folder) or not (folder / "config.json").is_file():
        return read_model(loaded), ()
    warning = f"{folder} holds no weights: planned from its config.json alone; a run needs them"
    return read_model(loaded, needs_weights=False), (warning,)


def _assumed_work(limit: int) -> str:
    """Prompts that a context of `limit` tokens holds, a fifth of it for the output at least."""
    tokens = min(_ASSUMED_TOKENS, max(1, limit * 4 // 5))
    return f"{_ASSUMED_PROMPTS}x{tokens}x{_ASSUMED_OUTPUT}"


def _prompts(loaded: LoadedConfig, model: ModelFacts, request: PlanRequest) -> PromptLengths:
    """The lengths of the configuration's prompts, or of other work.

    Raises:
        ConfigError: the prompt file cannot be read, or none of its prompts can be run.
    """
    path = loaded.config.prompts.path
    asked = loaded.config.memory.max_context_tokens
    limit = min(asked, model.spec.max_context_tokens) if isinstance(asked, int) else None
    limit = limit or model.spec.max_context_tokens
    work = request.work
    if work is None and not (path or loaded.inline_prompts):
        work, source = (
            _assumed_work(limit),
            "assumed: no prompts are configured, --work says others",
        )
    elif work is None and path == _STANDARD_INPUT:
        work, source = (
            _assumed_work(limit),
            "assumed: standard input is not read, --work says others",
        )
    else:
        source = "--work"
    if work is not None:
        asked_for = BenchWork.parse(work)
        lengths = asked_for.lengths(loaded.config.generation.seed)
        cut = tuple((prompt, min(output, limit - prompt)) for prompt, output in lengths)
        cut = tuple(pair for pair in cut if pair[1] > 0)
        if not cut:
            raise ConfigError(f"--work {work}: no prompt fits a context of {limit} tokens")
        num_cut = len(lengths) - len(cut)
        return PromptLengths(cut, source, num_cut, shared_ratio=asked_for.shared_ratio)
    lines = configured_prompts(loaded)
    found = prompt_lengths(lines, model.tokenizer_folder, limit)
    if found is None:
        raise ConfigError(
            f"none of the {len(lines)} prompts can be run: they are broken, or longer than the "
            f"context of {limit} tokens; `mpipipe run` would write an error record for each"
        )
    return found


# ---- where ---------------------------------------------------------------------------------------


def _machine(request: PlanRequest, table: GpuTable) -> DescribedMachine | None:
    """What `--gpus` describes; None: this machine.

    Raises:
        ConfigError: a part that cannot be read, or an option that means nothing here.
    """
    if request.gpus is None:
        given = {
            "--nodes": request.num_nodes,
            "--link": request.link,
            "--host-memory": request.host_memory,
        }
        if stray := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f'{stray[0]} describes a machine: give --gpus "2 x t4" with it')
        return None
    if request.num_stages is not None:
        raise ConfigError("--gpus says how many ranks there are, one a GPU: leave out --stages")
    machine = DescribedMachine(parse_gpus(request.gpus, table))
    if request.link is not None:
        machine = replace(machine, link=link_named(request.link))
    if request.num_nodes is not None:
        machine = replace(machine, num_nodes=request.num_nodes)
    if request.host_memory is not None:
        try:
            machine = replace(machine, host_memory_bytes=parse_bytes(request.host_memory))
        except ValueError as error:
            raise ConfigError(f"--host-memory {request.host_memory!r} {error}") from None
    return machine


def _for_described(
    loaded: LoadedConfig, ranks: Sequence[RankResources]
) -> tuple[LoadedConfig, tuple[str, ...], tuple[Resolved, ...]]:
    """On GPUs, whatever the configuration says, in numbers that they have.

    And what of the configuration is not used; and what a run there needs instead.
    """
    config, ignored, needs = loaded.config, [], []
    if config.pipeline.device == "cpu":
        config = replace(config, pipeline=replace(config.pipeline, device="cuda"))
        ignored.append('pipeline.device = "cpu": planned for the GPUs of --gpus')
    asked = config.model.dtype
    if dtype := needed_dtype(asked, ranks):
        config = replace(config, model=replace(config.model, dtype=dtype))
        reason = f"{least_capable(ranks).gpu.name} cannot compute in {asked}; a run must ask for it"
        needs.append(Resolved("model.dtype", dtype, reason))
    return replace(loaded, config=config), tuple(ignored), tuple(needs)


def _ranks_here(loaded: LoadedConfig, request: PlanRequest) -> list[RankResources]:
    pipeline = loaded.config.pipeline
    number = pipeline.num_stages if isinstance(pipeline.num_stages, int) else 1
    number *= pipeline.replicas if isinstance(pipeline.replicas, int) else 1
    return ranks_of_this_host(loaded, request.num_stages or number * pipeline.tensor_parallel)


def ranks_of_this_host(loaded: LoadedConfig, num_ranks: int) -> list[RankResources]:
    """What `num_ranks` ranks of this host would have."""
    backends = installed_attention_backends()
    return [
        read_rank_resources(
            rank,
            launcher=Launcher.NONE.value,
            gpu=gpu,
            attention_backends=backends if gpu.index >= 0 else (),
            offload_dir=loaded.config.memory.offload_dir,
        )
        for rank, gpu in enumerate(_gpus(loaded.config.pipeline.device, num_ranks))
    ]


def _gpus(device: str, num_ranks: int) -> list[GpuFacts]:
    """The GPU of each rank, as the driver tells; whether torch can use it is not tried."""
    found = query_host()[0] if device != "cpu" and driver_in_sight() else ()
    if found:
        return [found[gpu_of_rank(rank, len(found))] for rank in range(num_ranks)]
    problem = no_driver_problem(os.environ) if device == "cuda" else ""
    return [GpuFacts(problem=problem)] * num_ranks
