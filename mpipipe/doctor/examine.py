"""`mpipipe doctor`: every rank collects, the head checks. Runs alone, under mpirun and under srun.

Order: join, facts of every rank, then what only makes sense when those are in order: messages,
clocks, links, the job itself. Ranks that cannot join are a finding too, not a failure. `cli.doctor`
prints what is found.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mpipipe.clock import Clock
from mpipipe.config.load import LoadedConfig, config_hash, load_config
from mpipipe.config.schema import AUTO
from mpipipe.control_plane.probe import probe_control_plane
from mpipipe.doctor.checks.measured import check_clocks, check_control, check_links
from mpipipe.doctor.checks.ranks import check_ranks, not_joined
from mpipipe.doctor.facts import LaunchFacts, RankFacts
from mpipipe.doctor.finding import DoctorReport, Finding
from mpipipe.doctor.job import examine_job
from mpipipe.doctor.probes.gpu import probe_before_torch, probe_with_torch
from mpipipe.doctor.probes.process import (
    import_torch,
    loaded_libraries,
    probe_launch,
    probe_node,
    probe_software,
)
from mpipipe.errors import EXIT_ENVIRONMENT, EXIT_OK, EnvironmentSetupError, MpipipeError
from mpipipe.plain_values import from_json, to_json
from mpipipe.runtime.clock_offsets import measure_clock_offsets
from mpipipe.runtime.handshake import exchange_resources, local_rank_of
from mpipipe.runtime.ranks import PHASE_DEADLINE_S, Ranks, open_ranks, share_exit_code
from mpipipe.topology.host import host_name
from mpipipe.topology.launcher import detect
from mpipipe.types import DeviceName

__all__ = ["LAST_WORD_S", "run_doctor"]

# How long ranks that are alone wait for the first of them to speak, which may start seconds later:
# under `srun --kill-on-bad-exit` the first rank that ends with an error ends all of them.
LAST_WORD_S = 20.0
_DEADLINE_S = 180.0  # importing torch from a busy parallel file system
# Enough for stable medians; 2.5 s in all, with the time until an idle rank polls at its slowest.
_NUM_MESSAGES = 2000
_IDLE_S = 0.4


@dataclass(frozen=True, slots=True)
class _Course:
    """What all ranks do next, decided by the head."""

    measure: bool
    device: DeviceName  # of the tensors whose links are measured
    links: bool
    job: bool


async def run_doctor(
    config_path: Path | None,
    overrides: Sequence[str],
    clock: Clock,
    *,
    quick: bool,
    debug: bool,
) -> tuple[DoctorReport | None, int]:
    """Examine this launch, and the job when one is named.

    Returns the report on the head (None elsewhere) and the exit code, the same on every rank.

    Raises:
        MpipipeError: a rank was lost on the way, or did not answer.
    """
    started_s = clock.now_s()
    loaded, problem = _try_load(config_path, overrides)
    joined = False
    try:
        async with open_ranks(clock, debug=debug) as ranks:
            joined = True
            local_rank = await local_rank_of(ranks, _DEADLINE_S)
            own = await _collect_facts(ranks, local_rank, loaded, problem)
            parts = await ranks.mesh.gather("facts", to_json(own).encode(), _DEADLINE_S)
            facts = None if parts is None else [from_json(RankFacts, part) for part in parts]
            findings = await _examine(ranks, loaded, facts, local_rank=local_rank, quick=quick)
            report = _report(findings, facts, clock.now_s() - started_s)
            code = EXIT_OK if report is None else report.exit_code
            return report, await share_exit_code(ranks, code, PHASE_DEADLINE_S)
    except EnvironmentSetupError as error:
        if joined:
            raise
        if detect(os.environ).rank not in {None, 0}:
            await _hear_the_head()
            return None, EXIT_ENVIRONMENT  # rank 0 tells it for all
        return _alone(error, clock.now_s() - started_s), error.exit_code


async def _hear_the_head() -> None:
    """Wait until the head has spoken; srun then sends TERM, which is no failure of this rank."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    try:
        async with asyncio.timeout(LAST_WORD_S):
            await ended.wait()
    except TimeoutError:
        pass  # srun does not end this rank: no --kill-on-bad-exit
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def _alone(error: EnvironmentSetupError, elapsed_s: float) -> DoctorReport:
    """Ranks that have not met: at once, without torch, as the first that ends may end them all."""
    mpi_loaded = any(library.name == "libmpi" for library in loaded_libraries())
    finding = not_joined(error, mpi_loaded=mpi_loaded)
    return DoctorReport((finding,), 1, (host_name(),), elapsed_s)


def _report(
    findings: list[Finding], facts: Sequence[RankFacts] | None, elapsed_s: float
) -> DoctorReport | None:
    if facts is None:
        return None
    hosts = tuple(dict.fromkeys(rank.host for rank in facts))
    return DoctorReport(tuple(findings), len(facts), hosts, elapsed_s)


def _try_load(
    path: Path | None, overrides: Sequence[str]
) -> tuple[LoadedConfig | None, MpipipeError | None]:
    """The configuration, or why there is none; neither when no job was named."""
    if path is None:
        return None, None
    try:
        return load_config(path, overrides), None
    except MpipipeError as error:
        return None, error


async def _collect_facts(
    ranks: Ranks, local_rank: int, loaded: LoadedConfig | None, problem: MpipipeError | None
) -> RankFacts:
    """What this rank sees. Imports torch in a thread, so that messages go on meanwhile."""
    wanted = loaded.config.pipeline.device if loaded is not None else AUTO
    node = probe_node(os.environ)  # before torch takes its share of the memory
    (gpu, gpus), imported = await asyncio.gather(
        asyncio.to_thread(probe_before_torch, os.environ, wanted=wanted),
        asyncio.to_thread(import_torch),
    )
    launch = _launch(ranks)
    if not imported.torch_problem:
        gpu = probe_with_torch(gpu, gpus, local_rank)
    return RankFacts(
        rank=ranks.mesh.rank,
        host=host_name(),
        launch=launch,
        software=probe_software(os.environ, imported),
        node=node,
        gpu=gpu,
        config_hash=config_hash(loaded.config) if loaded is not None else "",
        config_problem=str(problem) if problem is not None else "",
        config_exit_code=problem.exit_code if problem is not None else 0,
    )


def _launch(ranks: Ranks) -> LaunchFacts:
    joined, module = LaunchFacts(world_size=ranks.mesh.world_size), ""
    if ranks.mpi_library:
        from mpipipe.control_plane import mpi

        module = mpi.module_file()
        joined = replace(joined, mpi_library=ranks.mpi_library, thread_level=mpi.thread_level())
    return probe_launch(os.environ, joined, is_head=ranks.is_head, mpi_module=module)


async def _examine(
    ranks: Ranks,
    loaded: LoadedConfig | None,
    facts: list[RankFacts] | None,
    *,
    local_rank: int,
    quick: bool,
) -> list[Finding]:
    """All findings on the head, nothing elsewhere."""
    decided = None if facts is None else _decide(facts, loaded, quick=quick)
    payload = None if decided is None else to_json(decided).encode()
    course = from_json(_Course, await ranks.mesh.broadcast("course", payload, _DEADLINE_S))
    findings: list[Finding] = []
    if facts is not None:
        share = loaded is not None and loaded.config.pipeline.share_gpus
        findings += check_ranks(facts, share_gpus=share)
    if course.measure:
        findings += await _measure(ranks, course, facts or ())
    if course.job and loaded is not None:
        findings += await examine_job(ranks, loaded, facts, local_rank=local_rank, quick=quick)
    return findings


def _decide(facts: Sequence[RankFacts], loaded: LoadedConfig | None, *, quick: bool) -> _Course:
    """What the facts allow: ranks that run different things cannot be measured together."""
    alike = len({rank.software.versions.get("mpipipe") for rank in facts}) == 1
    torch_works = not any(rank.software.torch_problem for rank in facts)
    on_gpus = all(rank.gpu.rank_gpu.index >= 0 for rank in facts)
    measure = alike and not quick and len(facts) > 1
    return _Course(
        measure=measure,
        device="cuda" if on_gpus else "cpu",
        links=measure and torch_works,
        job=alike
        and torch_works
        and loaded is not None
        and len({rank.config_hash for rank in facts}) == 1,
    )


async def _measure(ranks: Ranks, course: _Course, facts: Sequence[RankFacts]) -> list[Finding]:
    """Messages, clocks and links between the ranks; findings on the head, which has the facts."""
    findings: list[Finding] = []
    await exchange_resources(ranks, "cpu", deadline_s=_DEADLINE_S)
    probe = await probe_control_plane(
        ranks.mesh, raw=ranks.raw, idle_s=_IDLE_S, num_messages=_NUM_MESSAGES
    )
    if probe is not None:
        findings += check_control(probe)
    offsets = await measure_clock_offsets(ranks, time.time)
    findings += check_clocks(offsets, {rank.rank: rank.host for rank in facts})
    if course.links:
        infiniband = all(rank.node.infiniband for rank in facts)
        findings += await _links(ranks, course.device, infiniband=infiniband)
    return findings


async def _links(ranks: Ranks, device: DeviceName, *, infiniband: bool) -> list[Finding]:
    """Tensors between neighbouring stages; imports torch."""
    from mpipipe.doctor.probes.links import measure_links

    try:
        figures = await measure_links(ranks, device=device)
    except MpipipeError as error:  # on every rank
        return [Finding.of_error("links.edge", error)] if ranks.is_head else []
    return check_links(figures or [], infiniband=infiniband)
