"""What `mpipipe simulate` simulates: machines, plans and requests from its options."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpipipe.bench.workloads import BenchWork
from mpipipe.cli.plan import ranks_of_this_host
from mpipipe.cli.simulation_view import result_fields, show_result, write_trace
from mpipipe.config.load import load_config
from mpipipe.config.prompts import configured_prompts
from mpipipe.errors import EXIT_BUG, EXIT_OK, ConfigError
from mpipipe.logs.reading import find_run
from mpipipe.planning.gpu_table import known_gpus
from mpipipe.planning.link_table import link_named
from mpipipe.planning.machine import DescribedMachine, described_ranks, parse_gpus
from mpipipe.planning.model_facts import read_model
from mpipipe.planning.planned_job import PlannedJob
from mpipipe.planning.prompt_lengths import PromptLengths, prompt_lengths
from mpipipe.simulation.planned_times import PlannedTimes
from mpipipe.simulation.recorded_run import read_recorded_run
from mpipipe.simulation.simulate import ReplicaPlan, SimulationOptions, simulate_job
from mpipipe.simulation.simulated_requests import RequestLengths
from mpipipe.simulation.stage_times import HeadTimes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpipipe.planning.model_facts import ModelFacts
    from mpipipe.planning.resources import RankResources
    from mpipipe.simulation.recorded_run import Measured

__all__ = ["SimulationRequest", "simulate_command"]

# Of a head beside its device, as `BENCHMARKS.md` has it: 69 to 95 µs for a step; a message takes 20
# µs on a host, and the ids as long from stage 0's device to the scheduler.
_STEP_S, _MESSAGE_S, _NOTICE_S = 90e-6, 20e-6, 20e-6
_LAUNCH_S = 200e-6  # of a GPU's host for a step: 101 to 502 µs, the head's decisions included
_TRACE_STEPS = 2000
# Of more replicas that are all alike, these are planned, and the others are as they are.
_MOST_PLANNED = 64


@dataclass(frozen=True, slots=True)
class SimulationRequest:
    """The options of `mpipipe simulate`."""

    config: Path | None
    words: tuple[str, ...]
    gpus: str
    num_nodes: int
    link: str
    num_stages: int
    num_replicas: int
    work: str
    seed: int
    from_run: Path | None
    stand_for_all: int
    dispatch_s: tuple[float, float]
    trace: Path | None
    as_json: bool


@dataclass(frozen=True, slots=True)
class _Job:
    """What is simulated, and where it comes from."""

    replicas: Sequence[ReplicaPlan]
    requests: Sequence[RequestLengths]
    head: HeadTimes
    source: str
    measured: Measured | None = None
    forecast: float | None = None  # tokens/s, by `mpipipe plan`
    notes: tuple[str, ...] = ()


def simulate_command(request: SimulationRequest) -> int:
    """Simulate and print; returns the exit code: a deadlock is a bug.

    Raises:
        MpipipeError: the options do not describe a job that can run.
    """
    began_s = time.perf_counter()
    job = _recorded_job(request) if request.from_run is not None else _described_job(request)
    options = SimulationOptions(
        job.head,
        num_simulated_replicas=request.stand_for_all,
        launch_s=_LAUNCH_S,
        trace_steps=_TRACE_STEPS if request.trace is not None else 0,
    )
    simulation = simulate_job(job.replicas, job.requests, options)
    took_s = time.perf_counter() - began_s
    result = replace(simulation.result, simulation_s=took_s, notes=job.notes)
    if request.trace is not None:
        write_trace(request.trace, simulation.records, result)
    if request.as_json:
        fields = result_fields(result, job.source, job.measured)
        print(json.dumps({**fields, "forecast_tokens_per_s": job.forecast}, indent=2))
    else:
        show_result(result, job.source, measured=job.measured, forecast=job.forecast)
    return EXIT_BUG if result.deadlocks else EXIT_OK


def _recorded_job(request: SimulationRequest) -> _Job:
    assert request.from_run is not None, "asked for"
    if request.config is not None or request.gpus:
        raise ConfigError(
            "--from takes plan, prompts and times from the run: leave CONFIG and --gpus out"
        )
    files = find_run(request.from_run)
    recorded = read_recorded_run(files)
    replica = ReplicaPlan(recorded.plan, recorded.times)
    source = f"the steps of {files.folder}"
    return _Job(
        [replica],
        recorded.requests,
        recorded.head,
        source,
        measured=recorded.measured,
        notes=recorded.notes,
    )


def _described_job(request: SimulationRequest) -> _Job:
    if request.config is None:
        raise ConfigError("give a configuration or a model folder to simulate, or --from RUN")
    num_replicas = request.num_replicas
    num_planned = _num_planned(request)
    words = list(request.words)
    if request.num_stages:
        words.append(f"pipeline.num_stages={request.num_stages}")
    if num_replicas:
        words.append(f"pipeline.replicas={num_planned}")
    model = read_model(load_config(request.config, words), needs_weights=False)
    prompts = _prompts(request, model)
    outlook = PlannedJob(
        config=model.loaded.config,
        spec=model.spec,
        ranks=tuple(_ranks(request, model, num_planned)),
        model_path=str(model.folder),
        prompts=_share(prompts, num_planned, num_replicas),
        notes=model.notes,
        far=link_named(request.link),
    ).outlook()
    replicas = [
        ReplicaPlan(plan, PlannedTimes(plan, times))
        for plan, times in zip(outlook.plans, outlook.times, strict=True)
    ]
    forecast = outlook.forecast.tokens_per_s
    if num_planned < num_replicas:
        replicas = [replicas[number % num_planned] for number in range(num_replicas)]
        forecast *= num_replicas / num_planned
    common = prompts.common or ((-1, 0),) * len(prompts.lengths)
    requests = [
        RequestLengths(i, *pair, pair[1], *begins)
        for i, (pair, begins) in enumerate(zip(prompts.lengths, common, strict=True))
    ]
    message_s, prompt_s = request.dispatch_s
    head = HeadTimes(_STEP_S, _MESSAGE_S, _NOTICE_S, message_s, prompt_s)
    source = f"{_machine_words(request, outlook.forecast.source)}; {prompts.source}"
    return _Job(replicas, requests, head, source, forecast=forecast)


def _num_planned(request: SimulationRequest) -> int:
    """Of very many replicas on cards of one kind some are planned, and the others are like them."""
    kinds = len(set(parse_gpus(request.gpus, known_gpus()))) if request.gpus else 1
    if kinds > 1 or not request.num_stages:
        return request.num_replicas
    return min(request.num_replicas, _MOST_PLANNED)


def _ranks(request: SimulationRequest, model: ModelFacts, num_planned: int) -> list[RankResources]:
    """A rank for each stage that is planned; where it is on, in blocks over the nodes."""
    num_lanes = model.loaded.config.pipeline.tensor_parallel
    num_ranks = request.num_stages * num_lanes * max(1, request.num_replicas)
    if not request.gpus:
        num_ranks = request.num_stages * num_lanes * max(1, num_planned)
        return ranks_of_this_host(model.loaded, num_ranks or num_lanes)
    gpus = parse_gpus(request.gpus, known_gpus())
    num_ranks = num_ranks or len(gpus)
    if num_ranks % len(gpus):
        raise ConfigError(
            f"{max(1, request.num_replicas)} replicas of {request.num_stages} stages take "
            f"{num_ranks} GPUs, and --gpus {request.gpus!r} has {len(gpus)}: name as many, or a "
            "part that is repeated"
        )
    gpus *= num_ranks // len(gpus)
    num_nodes = request.num_nodes
    if num_planned < request.num_replicas:
        gpus = gpus[: request.num_stages * num_lanes * num_planned]
        num_nodes = max(1, num_nodes * num_planned // request.num_replicas)
    machine = DescribedMachine(gpus, num_nodes=num_nodes, link=link_named(request.link))
    return described_ranks(machine)


def _prompts(request: SimulationRequest, model: ModelFacts) -> PromptLengths:
    """The prompts as far as a simulation looks at them, and how their lengths were found."""
    if request.work:
        return BenchWork.parse(request.work).prompt_lengths(request.seed, request.work)
    lines = configured_prompts(model.loaded)
    counted = prompt_lengths(lines, model.tokenizer_folder, model.spec.max_context_tokens)
    if counted is None:
        raise ConfigError("no prompt of the file can be run: see what `mpipipe run` says of it")
    return replace(counted, source=f"the configured prompts, {counted.source}")


def _share(prompts: PromptLengths, part: int, whole: int) -> PromptLengths:
    """Of all of them, evenly, `part` of `whole`; all, where that is no part."""
    if part >= whole:
        return prompts
    lengths = prompts.lengths
    number = -(-len(lengths) * part // whole)
    numbers = [i * len(lengths) // number for i in range(number)]
    shared = tuple([lengths[i] for i in numbers])
    common = tuple([prompts.common[i] for i in numbers]) if prompts.common else ()
    return replace(prompts, lengths=shared, common=common)


def _machine_words(request: SimulationRequest, times_source: str) -> str:
    if not request.gpus:
        return f"of CPU ranks of this host, {times_source}"
    over = f" over {request.link}" if request.num_nodes > 1 else ""
    nodes = f"{request.num_nodes:,} node{'s' * (request.num_nodes > 1)}"
    return f"rates of {request.gpus}, {nodes}{over}"
