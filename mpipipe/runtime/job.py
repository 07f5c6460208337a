"""`mpipipe run`: a prompt file in, a run folder out. All ranks run this; the head reports."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import aclosing, closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mpipipe.config.load import load_config
from mpipipe.config.prompts import read_prompts
from mpipipe.config.schema import AUTO
from mpipipe.errors import EXIT_OK, EXIT_PROMPTS
from mpipipe.metrics.log import open_log
from mpipipe.metrics.summary import PhaseTimes, RequestTally, RunSummary
from mpipipe.planning.sampling_use import SamplingUse
from mpipipe.planning.workload import Workload
from mpipipe.runtime.greeting import greet
from mpipipe.runtime.inputs import deepspeed_warnings, read_model
from mpipipe.runtime.launch import Ranks, in_phase, open_ranks
from mpipipe.runtime.manifest import build_manifest
from mpipipe.runtime.output import CompletionWriter, claim_run_folder, merge, write_json
from mpipipe.runtime.requests import PreparedPrompts, prepare
from mpipipe.topology.host import host_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.clock import Clock
    from mpipipe.config.load import LoadedConfig
    from mpipipe.config.prompts import PromptLine
    from mpipipe.metrics.log import RunLog
    from mpipipe.models.tokenizer import Tokenizer
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.runtime.inputs import ModelFacts
    from mpipipe.runtime.session import Session
    from mpipipe.types import Completion

__all__ = ["JobView", "run_job"]

_PROGRESS_INTERVAL_S = 0.25
_FOLDER_DEADLINE_S = 120.0


class JobView(Protocol):
    """What the head shows while the job runs; called on the head only."""

    def planned(self, plan: PipelinePlan, warnings: Sequence[str]) -> None:
        """The plan is agreed, loading begins."""
        ...

    def generating(self, num_prompts: int, mode: str) -> None:
        """Every stage is loaded."""
        ...

    def progress(self, done: int, failed: int, output_tokens: int, running: int) -> None:
        """The state now; called a few times a second."""
        ...

    def completed(self, completion: Completion) -> None:
        """One prompt ended."""
        ...

    def ended(self) -> None:
        """Generation is over, well or not: leave the terminal in order."""
        ...

    def finished(self, summary: RunSummary, folder: Path) -> None:
        """All is written."""
        ...


@dataclass(slots=True)
class _Marks:
    """When the phases of the run ended, in seconds of the run's clock."""

    started_s: float
    booted_s: float = 0.0
    loaded_s: float = 0.0
    generated_s: float = 0.0

    def phases(self, now_s: float) -> PhaseTimes:
        return PhaseTimes(
            boot_s=self.booted_s - self.started_s,
            load_s=self.loaded_s - self.booted_s,
            generate_s=self.generated_s - self.loaded_s,
            shutdown_s=now_s - self.generated_s,
        )


async def run_job(
    config_path: Path,
    overrides: Sequence[str],
    view: JobView,
    clock: Clock,
    *,
    started_s: float,
    debug: bool,
) -> int:
    """Complete the configured prompts; returns the exit code, the same on every rank.

    Raises:
        MpipipeError: on every rank, after an orderly end; the job is aborted otherwise.
    """
    marks = _Marks(started_s)
    async with open_ranks(clock, debug=debug) as ranks:
        loaded = await in_phase(
            ranks, "configuration", lambda: load_config(config_path, overrides), _FOLDER_DEADLINE_S
        )
        hellos = await greet(ranks, loaded)
        model, lines = await in_phase(ranks, "inputs", lambda: _read_inputs(ranks, loaded))
        folder = await _claim(ranks, loaded)
        rank = ranks.mesh.rank
        log = open_log(
            folder / f"rank_{rank}.log",
            rank=rank,
            host=host_name(),
            level=loaded.config.log.level,
            stage=rank,
        )
        with closing(log):
            log.info("greeted", hellos=[dataclasses.asdict(hello) for hello in hellos])
            # torch and transformers take seconds to import: only now, when the input is in order.
            from mpipipe.runtime.boot import Boot, open_session

            tokenizer, prompts = await in_phase(
                ranks, "tokenizer", lambda: _tokenize(loaded, model, lines)
            )
            marks.booted_s = clock.now_s()
            workload = _workload(loaded, model, prompts)
            boot = Boot(ranks, loaded, hellos, model, tokenizer, workload, log)
            async with open_session(boot) as session:
                marks.loaded_s = clock.now_s()
                return await _run(_Job(session, loaded, folder, log, view, marks), prompts)


@dataclass(frozen=True, slots=True)
class _Job:
    """A loaded run and where it reports to."""

    session: Session
    loaded: LoadedConfig
    folder: Path
    log: RunLog
    view: JobView
    marks: _Marks


async def _run(job: _Job, prompts: PreparedPrompts | None) -> int:
    session, loaded, log, view = job.session, job.loaded, job.log, job.view
    if prompts is None:
        await session.serve_until_ended()
        await session.gather_reports()
        log.info("ended")
        return await _share_exit_code(session, EXIT_OK)
    warnings = [*loaded.warnings, *deepspeed_warnings(loaded, session.plan)]
    for warning in warnings:
        log.warning("configuration", message=warning)
    view.planned(session.plan, warnings)
    prompt_path = loaded.config.prompts.path
    manifest = build_manifest(
        session, loaded, job.folder, Path(prompt_path) if prompt_path else None
    )
    write_json(job.folder / "manifest.json", manifest)
    tally = await _complete(job, prompts)
    job.marks.generated_s = session.ranks.clock.now_s()
    session.end()
    reports = await session.gather_reports()
    assert reports is not None, "the head gathers"
    statistics = session.statistics()
    totals = tally.totals()
    summary = RunSummary(
        phases=job.marks.phases(session.ranks.clock.now_s()),
        requests=totals,
        num_preemptions=statistics.num_preemptions if statistics is not None else 0,
        ranks=reports,
    )
    write_json(job.folder / "metrics.json", summary.to_dict())
    log.info("summary", **summary.to_dict())
    view.finished(summary, job.folder)
    return await _share_exit_code(session, EXIT_PROMPTS if totals.num_failed else EXIT_OK)


async def _complete(job: _Job, prompts: PreparedPrompts) -> RequestTally:
    """Generate, write each completion as it ends, merge them in input order."""
    session, folder, log, view = job.session, job.folder, job.log, job.view
    tally = RequestTally()
    view.generating(prompts.num_prompts, job.loaded.config.log.progress)
    with CompletionWriter(folder, session.ranks.mesh.rank) as writer:

        def take(completion: Completion) -> None:
            writer.write(completion)
            tally.add(completion)
            log.info(
                "completed",
                request=completion.request_id,
                finish_reason=completion.finish_reason.value,
                num_prompt_tokens=completion.num_prompt_tokens,
                num_output_tokens=completion.num_output_tokens,
                latency_s=round(completion.latency_s, 6),
                error=completion.error_kind,
            )
            view.completed(completion)

        for completion in prompts.refused:
            take(completion)
        showing = session.ranks.tasks.create_task(_show(session, tally, view), name="progress view")
        try:
            async with aclosing(session.generate(prompts.requests)) as completions:
                async for completion in completions:
                    take(completion)
        finally:
            showing.cancel()
            view.ended()
        merge(folder, writer.index_of)
    return tally


async def _show(session: Session, tally: RequestTally, view: JobView) -> None:
    """Keep the progress display alive until cancelled."""
    while True:
        totals = tally.totals()
        statistics = session.statistics()
        running = statistics.num_running if statistics is not None else 0
        view.progress(totals.num_completed, totals.num_failed, session.num_output_tokens, running)
        await asyncio.sleep(_PROGRESS_INTERVAL_S)


def _read_inputs(ranks: Ranks, loaded: LoadedConfig) -> tuple[ModelFacts | None, list[PromptLine]]:
    """Model facts and prompt lines, on the head; nothing elsewhere."""
    if not ranks.is_head:
        return None, []
    config = loaded.config
    path = Path(config.prompts.path) if config.prompts.path else None
    lines = read_prompts(path, config.generation, config.prompts.limit, loaded.inline_prompts)
    return read_model(loaded), lines


def _tokenize(
    loaded: LoadedConfig, model: ModelFacts | None, lines: Sequence[PromptLine]
) -> tuple[Tokenizer | None, PreparedPrompts | None]:
    if model is None:
        return None, None
    from mpipipe.models.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(model.tokenizer_folder, loaded.config.model.trust_remote_code)
    special = loaded.config.prompts.add_special_tokens
    return tokenizer, prepare(lines, tokenizer, add_special_tokens=special)


def _workload(
    loaded: LoadedConfig, model: ModelFacts | None, prompts: PreparedPrompts | None
) -> Workload:
    if model is None or prompts is None:
        return Workload()
    limit = loaded.config.memory.max_context_tokens
    context = model.spec.max_context_tokens if limit == AUTO else int(limit)
    return Workload(
        num_requests=len(prompts.requests),
        longest_request_tokens=prompts.longest_tokens(context),
        num_prompt_tokens=sum(len(request.prompt_ids) for request in prompts.requests),
        num_output_tokens=sum(request.sampling.max_new_tokens for request in prompts.requests),
        sampling=SamplingUse.of(request.sampling for request in prompts.requests),
    )


async def _claim(ranks: Ranks, loaded: LoadedConfig) -> Path:
    """The run folder, chosen and claimed by the head, the same on every rank."""

    def claim() -> Path | None:
        if not ranks.is_head:
            return None
        setting = loaded.config.output.dir
        if setting == AUTO:
            setting = f"runs/{loaded.config.name}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = Path(setting).absolute()
        claim_run_folder(folder, overwrite=loaded.config.output.overwrite)
        return folder

    folder = await in_phase(ranks, "output", claim, _FOLDER_DEADLINE_S)
    payload = None if folder is None else str(folder).encode()
    name = (await ranks.mesh.broadcast("output", payload, _FOLDER_DEADLINE_S)).decode()
    return Path(name)


async def _share_exit_code(session: Session, exit_code: int) -> int:
    """The head's exit code on every rank: launchers report whichever they see first."""
    payload = str(exit_code).encode() if session.is_head else None
    shared = await session.ranks.mesh.broadcast("exit code", payload, _FOLDER_DEADLINE_S)
    return int(shared.decode())
