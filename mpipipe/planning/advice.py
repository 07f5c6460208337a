"""What would make a job faster, or make it fit: each change is planned anew and forecast. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mpipipe.config.schema import AUTO
from mpipipe.errors import ConfigError, EnvironmentSetupError, UnsupportedModelError
from mpipipe.planning.cost import stage_weight_bytes
from mpipipe.planning.link_table import LINKS, Link
from mpipipe.planning.machine import rank_like
from mpipipe.planning.planned_job import FREE_STAGES, Outlook, PlannedJob
from mpipipe.planning.rate_times import RateTimes

__all__ = ["Advice", "advise", "what_fits"]

_LEAST_GAIN = 0.02  # less is within what a forecast is good for
_MOST_ROWS = 1024
_LEAST_TOKENS = 256
_MOST_REPLICAS = 64
# Changes that leave as many stages on the same ranks.
_KEEP_STAGES = frozenset({"rows", "tokens", "slots", "quantize", "memory", "context", "link"})
_ETHERNET = ("1gbe", "10gbe", "25gbe", "100gbe", "hdr", "ndr")


@dataclass(frozen=True, slots=True)
class Advice:
    """A change, and what the job makes with it."""

    change: str  # a setting as one writes it, or what to get
    tokens_per_s: float
    gain: float  # of the tokens per second; 0.2: a fifth more


@dataclass(frozen=True, slots=True)
class _Change:
    """`kind`: of a kind only the best is told."""

    kind: str
    words: str
    job: PlannedJob


def advise(outlook: Outlook, most: int = 3) -> tuple[Advice, ...]:
    """The changes that help most, one of a kind, best first.

    What was not measured cannot be held against what was: then both go by rates, and the gain is
    taken over.
    """
    if not all(isinstance(times, RateTimes) for times in outlook.times):
        by_rates = replace(outlook.job, is_measured=False, learnt=None).outlook()
        scale = outlook.forecast.tokens_per_s / by_rates.forecast.tokens_per_s
        advices = advise(by_rates, most)
        return tuple(replace(each, tokens_per_s=each.tokens_per_s * scale) for each in advices)
    now = outlook.forecast.tokens_per_s
    best: dict[str, tuple[Advice, _Change]] = {}
    for change in _changes(outlook):
        advice = _advice(change.words, _with_split(change, outlook), now)
        held = best.get(change.kind)
        if advice.gain >= _LEAST_GAIN and (held is None or advice.gain > held[0].gain):
            best[change.kind] = (advice, change)
    chosen = sorted(best.values(), key=lambda pair: -pair[0].gain)[:most]
    told = [
        advice
        if _with_split(change, outlook) is change.job
        else _advice(change.words, change.job, now)
        for advice, change in chosen
    ]
    return tuple(sorted(told, key=lambda advice: -advice.gain))


def _advice(words: str, job: PlannedJob, now: float) -> Advice:
    """What `job` makes instead of `now` tokens per second; nothing if it cannot be planned."""
    found = _tried(job)
    tokens_per_s = 0.0 if found is None else found.forecast.tokens_per_s
    return Advice(words, tokens_per_s, tokens_per_s / now - 1)


def _with_split(change: _Change, outlook: Outlook) -> PlannedJob:
    """The changed job with the split of now, where it has the same stages: for a first look.

    What is told has a split of its own again.
    """
    plan, job = outlook.plan, change.job
    keeps = change.kind in _KEEP_STAGES and plan.num_replicas == 1
    if not keeps or job.config.pipeline.split != AUTO or plan.num_stages == 1:
        return job
    return job.having("pipeline", split=tuple(stage.num_layers for stage in plan.stages))


def what_fits(job: PlannedJob, most: int = 3) -> tuple[Advice, ...]:
    """Changes with which a job that has no plan has one, fastest first; `gain` is 0."""
    best: dict[str, Advice] = {}
    for change in _smaller(job):
        if len(best) == most:
            break
        found = None if change.kind in best else _tried(change.job)
        if found is not None:
            best[change.kind] = Advice(change.words, found.forecast.tokens_per_s, 0.0)
    return tuple(sorted(best.values(), key=lambda advice: -advice.tokens_per_s))


def _tried(job: PlannedJob) -> Outlook | None:
    """None: it cannot be planned."""
    try:
        return job.outlook()
    except (ConfigError, EnvironmentSetupError, UnsupportedModelError):
        return None


# ---- faster --------------------------------------------------------------------------------------


def _changes(outlook: Outlook) -> Iterator[_Change]:
    job = outlook.job
    yield from _more_lanes(job)
    yield from _narrower(job)
    yield _grown(job, 1)
    yield from _fewer(job)
    yield from _other_replicas(outlook)
    yield from _faster_link(job)
    if job.config.pipeline.split != AUTO:
        yield _Change("split", "pipeline.split=auto", job.having("pipeline", split=AUTO))
    if all(stage.offload is None for stage in outlook.plan.stages):  # else the plan has tried them
        yield from _other_limits(outlook)
    yield from _more_cache(outlook)


def _more_lanes(job: PlannedJob) -> Iterator[_Change]:
    """The same ranks, several of them to a stage."""
    for lanes in (2, 4, 8):
        if len(job.ranks) % lanes == 0 and job.config.pipeline.tensor_parallel != lanes:
            changed = job.having("pipeline", tensor_parallel=lanes, **FREE_STAGES)
            yield _Change("lanes", f"pipeline.tensor_parallel={lanes}{_freed(job)}", changed)


def _narrower(job: PlannedJob) -> Iterator[_Change]:
    if job.spec.quantized == "none" and job.config.model.quantize == "none":
        for quantize in ("int8", "fp8"):
            changed = job.having("model", quantize=quantize)
            yield _Change("quantize", f"model.quantize={quantize}", changed)


def _grown(job: PlannedJob, more: int) -> _Change:
    ranks = list(job.ranks)
    for _ in range(more):
        ranks.append(rank_like(ranks))
    last = ranks[-1]
    if last.has_gpu:
        words = f"{more} more {last.gpu.name}, {len(ranks)} in all"
    elif more == 1:
        words = f"1 more rank, on another host like this, {len(ranks)} ranks in all"
    else:
        words = f"{more} more ranks, each on another host like this, {len(ranks)} ranks in all"
    return _Change("ranks", f"{words}{_freed(job)}", job.on_ranks(ranks))


def _freed(job: PlannedJob) -> str:
    """What must be set beside another number of stages, where it is given now."""
    given = [name for name in FREE_STAGES if getattr(job.config.pipeline, name) != AUTO]
    return "".join(f", pipeline.{name}=auto" for name in given)


def _fewer(job: PlannedJob) -> Iterator[_Change]:
    """Without the ranks of one kind of device, where there are several kinds."""
    kinds = dict.fromkeys(rank.gpu.name for rank in job.ranks)
    for kind in kinds if len(kinds) > 1 else ():
        kept = [rank for rank in job.ranks if rank.gpu.name != kind]
        words = f"without the {kind}, with {len(kept)} in all{_freed(job)}"
        yield _Change("fewer", words, job.on_ranks(kept))


def _other_replicas(outlook: Outlook) -> Iterator[_Change]:
    """Every number of equal pipelines that the ranks can make."""
    job, num_ranks = outlook.job, len(outlook.job.ranks)
    for number in range(1, min(num_ranks, _MOST_REPLICAS) + 1):
        if num_ranks % number == 0 and number != outlook.plan.num_replicas:
            changed = job.having("pipeline", replicas=number, **FREE_STAGES)
            stages = num_ranks // number
            words = (
                f"pipeline.replicas={number}, of {stages} stage{'s' * (stages > 1)}{_freed(job)}"
            )
            yield _Change("replicas", words, changed)


def _other_limits(outlook: Outlook) -> Iterator[_Change]:
    job, plan = outlook.job, outlook.plan
    rows, tokens, slots = plan.max_sequences_per_slot, plan.max_tokens_per_step, plan.num_slots
    for number in (8 * rows, 4 * rows, 2 * rows, rows // 2):
        if 1 <= number <= _MOST_ROWS:
            changed = job.having("pipeline", max_sequences_per_slot=number)
            yield _Change("rows", f"pipeline.max_sequences_per_slot={number}", changed)
    for number in (2 * tokens, tokens // 2):
        if number >= _LEAST_TOKENS:
            changed = job.having("pipeline", max_tokens_per_step=number)
            yield _Change("tokens", f"pipeline.max_tokens_per_step={number}", changed)
    for number in (slots + 1, slots - 1):
        if number >= 1:
            changed = job.having("pipeline", num_slots=number)
            yield _Change("slots", f"pipeline.num_slots={number}", changed)


def _more_cache(outlook: Outlook) -> Iterator[_Change]:
    """Where the cache holds fewer sequences than the steps have rows for."""
    job, plan = outlook.job, outlook.plan
    longest = max(map(sum, job.prompts.lengths))
    wanted = min(len(job.prompts.lengths), plan.num_slots * plan.max_sequences_per_slot)
    if plan.num_kv_pages * plan.page_size_tokens >= wanted * longest:
        return
    if plan.device == "cuda" and job.config.memory.gpu_memory_fraction < 0.95:
        changed = job.having("memory", gpu_memory_fraction=0.95)
        yield _Change("memory", "memory.gpu_memory_fraction=0.95", changed)
    if plan.device == "cpu" and job.config.memory.kv_cache_bytes == "auto":
        changed = job.having("memory", num_kv_pages=2 * plan.num_kv_pages)
        yield _Change("memory", f"memory.num_kv_pages={2 * plan.num_kv_pages}", changed)
    if longest < plan.max_context_tokens:
        changed = job.having("memory", max_context_tokens=longest)
        yield _Change("context", f"memory.max_context_tokens={longest}", changed)


def _faster_link(job: PlannedJob) -> Iterator[_Change]:
    if len({rank.host for rank in job.ranks}) == 1:
        return
    faster: list[Link] = [LINKS[key] for key in _ETHERNET]
    faster = [link for link in faster if link.bytes_per_s > 1.5 * job.far.bytes_per_s]
    if faster:
        words = f"{faster[0].name} between the hosts instead of {job.far.name}"
        yield _Change("link", words, replace(job, far=faster[0]))


# ---- smaller -------------------------------------------------------------------------------------


def _fewest_ranks(job: PlannedJob) -> int:
    """With fewer like the last one the weights cannot all stand on the devices."""
    spec, last = job.spec, job.ranks[-1]
    dtype = job.config.model.dtype
    weight_bytes = stage_weight_bytes(
        replace(spec, quantized=job.config.model.quantize),
        spec.dtype if dtype == AUTO else dtype,
        num_layers=spec.num_layers,
        has_embedding=True,
        has_head=True,
    )
    room = last.memory_available_bytes
    if last.has_gpu:
        room = int(last.gpu.free_bytes * job.config.memory.gpu_memory_fraction)
    return max(len(job.ranks) + 1, -(-weight_bytes // max(1, room)))


def _smaller(job: PlannedJob) -> Iterator[_Change]:
    """What may let a job fit; of each kind the mildest first.

    Rows and tokens that are left open need no trial: offload has tried them all.
    """
    memory, pipeline = job.config.memory, job.config.pipeline
    if job.spec.quantized == "none" and job.config.model.quantize != "int8":
        yield _Change("quantize", "model.quantize=int8", job.having("model", quantize="int8"))
    if pipeline.replicas == 1 and len(job.ranks) > 1:
        yield _Change("replicas", "pipeline.replicas=auto", job.having("pipeline", replicas=AUTO))
    fewest = _fewest_ranks(job)
    for number in (fewest, fewest + 1, fewest + fewest // 4 + 2):
        if number > len(job.ranks):
            yield _grown(job, number - len(job.ranks))
    for setting in ("num_kv_pages", "kv_cache_bytes", "device_bytes", "host_bytes"):
        if getattr(memory, setting) != AUTO:
            changed = job.having("memory", **{setting: AUTO})
            yield _Change("memory", f"memory.{setting}=auto", changed)
    for setting in ("max_sequences_per_slot", "max_tokens_per_step", "split", "num_stages"):
        if getattr(pipeline, setting) != AUTO:
            changed = job.having("pipeline", **{setting: AUTO})
            yield _Change(setting, f"pipeline.{setting}=auto", changed)
    if pipeline.tensor_parallel > 1:
        changed = job.having("pipeline", tensor_parallel=1)
        yield _Change("lanes", "pipeline.tensor_parallel=1", changed)
    if pipeline.replicas not in {1, AUTO}:
        yield _Change("replicas", "pipeline.replicas=1", job.having("pipeline", replicas=1))
    if not memory.offload_dir:
        changed = job.having("memory", offload_dir="/tmp")
        yield _Change("disk", "memory.offload_dir=DIR, on a local disk of each host", changed)
    if job.ranks[0].has_gpu:
        roomy = tuple(replace(rank, memory_available_bytes=2**42) for rank in job.ranks)
        yield _Change("host", "more host memory to offload to", replace(job, ranks=roomy))
