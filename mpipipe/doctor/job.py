"""Examines the configured job on all ranks, without loading it: folders, prompts, plan, memory.

The plans are those that a new `mpipipe run` would make, one for each replica: from the same
handshake, and from prompts that are tokenised; when these are many, from the longest of them.
`checks.job` says what the figures mean.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import nullcontext

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.load import LoadedConfig
from mpipipe.config.prompts import PromptLine, configured_prompts
from mpipipe.config.schema import AUTO
from mpipipe.doctor.checks.job import (
    HostDemand,
    check_folders,
    check_memory,
    check_plan,
    check_prompts,
)
from mpipipe.doctor.checks.offload import check_offload
from mpipipe.doctor.facts import RankFacts
from mpipipe.doctor.finding import Finding, fatal, ok, split_advice, warning
from mpipipe.doctor.probes.folders import (
    FolderFacts,
    claim_marker,
    output_folder,
    probe_folders,
)
from mpipipe.errors import EXIT_CONFIG, MpipipeError, OutputError
from mpipipe.plain_values import from_json, to_json
from mpipipe.planning.cost import kv_page_bytes
from mpipipe.planning.job_plan import plan_job
from mpipipe.planning.model_facts import ModelFacts
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.rank_rooms import CPU_LIBRARY_BYTES, GPU_LIBRARY_BYTES
from mpipipe.planning.resolve import deepspeed_warnings
from mpipipe.planning.resources import RankResources
from mpipipe.planning.workload import SamplingUse, Workload
from mpipipe.run_folder.files import holds_run
from mpipipe.run_folder.resume import wants_resume
from mpipipe.runtime.handshake import handshake
from mpipipe.runtime.offload_folder import offload_need
from mpipipe.runtime.ranks import AgreedError, Ranks
from mpipipe.runtime.requests import tokenize
from mpipipe.topology.host import host_name
from mpipipe.topology.slurm import read_job

__all__ = ["examine_job"]

_DEADLINE_S = 120.0
_MANY_PROMPTS = 1_000  # of 200 words: 0.8 s on two cores
# Of the libraries' files, which the ranks of a host share; and of each rank by itself. Measured
# after torch 2.13 for CPUs and transformers were imported: 0.08 and 0.16 GiB; the rest is for
# activations. With CUDA guesses.
_SHARED_BYTES = {"cpu": 2**30 // 8, "cuda": 2**30}
_OWN_BYTES = {"cpu": CPU_LIBRARY_BYTES, "cuda": GPU_LIBRARY_BYTES}


async def examine_job(
    ranks: Ranks,
    loaded: LoadedConfig,
    facts: Sequence[RankFacts] | None,
    *,
    local_rank: int,
    quick: bool,
) -> list[Finding]:
    """The findings on the head, nothing elsewhere. All ranks call this, with equal settings.

    Args:
        ranks: joined, with nothing else going on.
        loaded: the same on every rank.
        facts: of all ranks, on the head.
        local_rank: of this rank; the first of each host looks at the folders.
        quick: measure no speed, and tokenise nothing.
    """
    try:
        resources = await handshake(ranks, loaded)
    except AgreedError as agreed:  # raised on every rank
        return [Finding.of_error("job.ranks", agreed.error)] if ranks.is_head else []
    folders, model = await _probe_folders(ranks, loaded, is_first=local_rank == 0, quick=quick)
    if facts is None or folders is None:
        return []
    findings: list[Finding] = [
        warning("job.config", text, "the configuration says so", "see the README's settings")
        for text in loaded.warnings
    ]
    lines = _read_prompts(loaded if model is None else model.loaded, findings)
    plans: tuple[PipelinePlan, ...] = ()
    if model is not None:
        workload = _workload(model, lines, findings, quick=quick)
        plans = _plans(loaded, model, resources, workload, findings)
    stage_bytes = max((stage.weight_bytes for stage in _stages(plans)), default=0)
    findings += check_folders(
        folders,
        container=facts[0].node.container,
        largest_stage_bytes=stage_bytes,
        demo=loaded.config.model.path.startswith("demo:"),
    )
    findings += check_offload(folders, _offload_needs(_stages(plans)))
    findings += _run_folder(loaded)
    if model is not None:
        findings += [check_memory(demand) for demand in _demands(plans, model, facts)]
    return findings


async def _probe_folders(
    ranks: Ranks, loaded: LoadedConfig, *, is_first: bool, quick: bool
) -> tuple[list[FolderFacts] | None, ModelFacts | None]:
    """What the first rank of every host sees, the head's host first; the head's own model."""
    with claim_marker(output_folder(loaded)) if ranks.is_head else nullcontext("") as name:
        payload = name.encode() if ranks.is_head else None
        marker = (await ranks.mesh.broadcast("marker", payload, _DEADLINE_S)).decode()
        own, model = b"", None
        if is_first or ranks.is_head:
            facts, model = probe_folders(loaded, marker, host_name(), quick=quick)
            own = to_json(facts).encode()
        parts = await ranks.mesh.gather("folders", own, _DEADLINE_S)
    if parts is None:
        return None, None
    return [from_json(FolderFacts, part) for part in parts if part], model


def _read_prompts(loaded: LoadedConfig, findings: list[Finding]) -> list[PromptLine]:
    try:
        lines = configured_prompts(loaded)
    except MpipipeError as error:
        findings.append(Finding.of_error("job.prompts", error))
        return []
    findings.append(check_prompts(lines))
    return lines


def _workload(
    model: ModelFacts,
    lines: Sequence[PromptLine],
    findings: list[Finding],
    *,
    quick: bool,
) -> Workload:
    """What a run knows before it plans; of many prompts, from those that seem to be the longest.

    Takes about 3 s unless `quick`: transformers is imported. Without lengths a plan has room for
    the longest that the model takes.
    """
    wanted = [line.sampling for line in lines if line.sampling is not None]
    if not wanted:  # which was told
        return Workload()
    counted = Workload(num_requests=len(wanted), sampling=SamplingUse.of(wanted))
    if quick:
        return counted
    longest = sorted(lines, key=_guessed_tokens, reverse=True)[:_MANY_PROMPTS]
    try:
        prepared = tokenize(model, longest)
    except MpipipeError as error:
        findings.append(Finding.of_error("job.tokenizer", error))
        return counted
    for what, remedy in map(split_advice, prepared.prompts.warnings):
        findings.append(warning("job.prompts", what, "", remedy))
    known = prepared.workload
    if len(lines) <= _MANY_PROMPTS:
        return known
    prompt_tokens = (known.num_prompt_tokens or 0) * len(lines) // _MANY_PROMPTS
    return dataclasses.replace(
        counted,
        longest_request_tokens=known.longest_request_tokens,
        num_prompt_tokens=prompt_tokens,  # at most: the others are shorter
        num_output_tokens=sum(sampling.max_new_tokens for sampling in wanted),
    )


def _guessed_tokens(line: PromptLine) -> float:
    """About how many a request comes to; some four letters are a token."""
    letters = len(line.text or "") + len(str(line.messages or ""))
    return letters / 4 + (line.sampling.max_new_tokens if line.sampling is not None else 0)


def _plans(
    loaded: LoadedConfig,
    model: ModelFacts,
    resources: Sequence[RankResources],
    workload: Workload,
    findings: list[Finding],
) -> tuple[PipelinePlan, ...]:
    """Of every replica, as a run would plan it; none: the reason is in a finding."""
    try:
        plans = plan_job(
            model.loaded.config,
            model.spec,
            resources,
            str(model.folder),
            workload,
            notes=model.notes,
        )
        told = deepspeed_warnings(loaded, plans[0])
    except MpipipeError as error:
        findings.append(Finding.of_error("job.plan", error))
        return ()
    findings.append(check_plan(plans[0]))
    findings += [
        warning("job.plan", text, "ds_config.json says otherwise", "change one of the two")
        for text in told
    ]
    return plans


def _stages(plans: Sequence[PipelinePlan]) -> list[StagePlan]:
    """Of all replicas."""
    return [stage for plan in plans for stage in plan.stages]


def _offload_needs(stages: Sequence[StagePlan]) -> dict[str, int]:
    """Bytes in `memory.offload_dir` by host."""
    needed: dict[str, int] = {}
    for stage in stages:
        needed[stage.host] = max(offload_need(stages, stage)[0], needed.get(stage.host, 0))
    return needed


def _run_folder(loaded: LoadedConfig) -> list[Finding]:
    """Whether an earlier run is in the way."""
    output, folder = loaded.config.output, output_folder(loaded)
    if output.dir == AUTO or not holds_run(folder):
        return []
    try:
        goes_on = wants_resume(output.resume, folder, read_job(os.environ))
    except OutputError as error:
        return [Finding.of_error("job.output", error)]
    if output.overwrite or goes_on:
        return [ok("job.output", f"{folder} holds an earlier run, as the settings expect")]
    remedy = (
        "choose another output.dir, or set output.resume=true to go on with it, or "
        "output.overwrite=true to replace it"
    )
    cause = "output.dir is that of an earlier run"
    return [fatal("job.output", f"{folder} already holds a run", cause, remedy, EXIT_CONFIG)]


def _host_weight_bytes(stage: StagePlan, *, on_cpu: bool) -> int:
    """Of a stage's weights in the memory of its host, of all its lanes together."""
    if on_cpu:
        return stage.device_weight_bytes * len(stage.ranks)
    return 0 if stage.offload is None else stage.offload.host_bytes * len(stage.ranks)


def _host_pages(plan: PipelinePlan, stages: Sequence[StagePlan], *, on_cpu: bool) -> int:
    """KV pages of all layers in the memory of a host; of layers whose cache is there, a share."""
    if on_cpu:
        return plan.num_kv_pages + plan.num_host_pages
    num_layers = sum(stage.num_layers for stage in stages)
    in_host = num_layers - sum(stage.num_kv_device_layers for stage in stages)
    return plan.num_host_pages + plan.num_kv_pages * in_host // num_layers


def _host_kv_bytes(plan: PipelinePlan, spec: ModelSpec, host: str, *, on_cpu: bool) -> int:
    """KV cache that a replica keeps in the memory of a host, of all lanes together."""
    stages = [stage for stage in plan.stages if stage.host == host]
    if not stages:
        return 0
    page_bytes = kv_page_bytes(
        spec,  # whole: the lanes of a stage share its heads
        plan.dtype,
        num_layers=sum(stage.num_layers for stage in stages),
        page_size_tokens=plan.page_size_tokens,
    )
    return _host_pages(plan, stages, on_cpu=on_cpu) * page_bytes


def _demands(
    plans: Sequence[PipelinePlan], model: ModelFacts, facts: Sequence[RankFacts]
) -> list[HostDemand]:
    """Memory by host, of all replicas. On GPUs only what is offloaded of weights and KV cache."""
    if not plans:
        return []
    on_cpu = plans[0].device == "cpu"
    device, demands = "cpu" if on_cpu else "cuda", []
    for host in dict.fromkeys(stage.host for stage in _stages(plans)):
        stages = [stage for stage in _stages(plans) if stage.host == host]
        node = next(rank.node for rank in facts if rank.host == host)
        num_ranks = sum(len(stage.ranks) for stage in stages)
        demands.append(
            HostDemand(
                host,
                weight_bytes=sum(_host_weight_bytes(stage, on_cpu=on_cpu) for stage in stages),
                kv_bytes=sum(
                    _host_kv_bytes(plan, model.spec, host, on_cpu=on_cpu) for plan in plans
                ),
                library_bytes=_SHARED_BYTES[device] + _OWN_BYTES[device] * num_ranks,
                available_bytes=node.memory_available,
                limit_bytes=node.memory_limit,
            )
        )
    return demands
