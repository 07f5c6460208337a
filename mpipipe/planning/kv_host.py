"""KV pages in host memory: how many, and which preempted sequences are moved there. Pure.

A preempted sequence either computes its tokens anew, or its pages are moved to host memory and
back. Both grow with its tokens, so the plan holds one number: the tokens from which moving is the
cheaper (`PipelinePlan.min_saved_tokens`). The slowest stage decides, of either. Without being asked
for, pages are taken only if they spare the run more than it takes to pin them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.errors import PlanError
from mpipipe.planning.cost import layer_decode_cost
from mpipipe.planning.memory import KvDemand, RankMemory, gib
from mpipipe.planning.offload_search import PIN_BYTES_PER_S
from mpipipe.planning.placement import StageSpeed
from mpipipe.planning.plan import Decisions, PipelinePlan, StagePlan
from mpipipe.planning.rank_rooms import kv_host_room, rank_rooms
from mpipipe.planning.resources import RankResources
from mpipipe.planning.workload import Workload

__all__ = ["KvHostFacts", "with_host_pages"]

_SETTING = "memory.kv_host_bytes"
# To begin a copy takes less than to begin a step of prompts; neither is counted. Copies run beside
# the steps, which wait for the first batch of a save and what of a restore one step does not
# hide: a guess of the share.
_WAITED_SHARE = 0.5
# Of all tokens that a run's sequences end with, those in the cache of a sequence when it is
# preempted, per e-fold that sequences grow from their prompts. In a simulation with one slot and
# cache for a quarter to a half (64 + 1,024, 128 + 512, 512 + 256 tokens) 0.15, 0.22 and 0.34; the
# pages that they take at most were as many as the cache has, times 0.35, 0.57 and 0.95 per e-fold.
_PREEMPTED_SHARE = 0.2
_HOST_PAGES_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class KvHostFacts:
    """What the choice goes by, beside the plan."""

    spec: ModelSpec  # as it is computed
    ranks: Sequence[RankResources]  # in the order of their stages
    world: Sequence[RankResources]  # all of the job, who share links
    demand: KvDemand
    needs: Sequence[RankMemory]  # in the same order
    decisions: Decisions
    workload: Workload

    @property
    def page_bytes(self) -> int:
        """Of a page on the stage where it takes most."""
        return max(need.page_bytes for need in self.needs)

    @property
    def growth(self) -> float:
        """e-folds from the run's prompts to its sequences' ends; 0: not known."""
        prompts, outputs = self.workload.num_prompt_tokens, self.workload.num_output_tokens
        return log((prompts + outputs) / prompts) if prompts and outputs else 0.0

    @property
    def num_preempted_tokens(self) -> float:
        """In the cache of sequences that are preempted, as far as it can be foreseen."""
        prompts, outputs = self.workload.num_prompt_tokens, self.workload.num_output_tokens
        return _PREEMPTED_SHARE * self.growth * ((prompts or 0) + (outputs or 0))


@dataclass(frozen=True, slots=True)
class _Costs:
    """Seconds, of the slowest stage."""

    token_s: float  # to compute a token of a preempted sequence anew
    page_s: float  # that steps wait while a page is moved out and back
    page_size: int

    @property
    def min_saved_tokens(self) -> int | None:
        """From so many tokens on moving is cheaper; None: never."""
        gain_s = self.token_s - self.page_s / self.page_size
        if gain_s <= 0:
            return None
        return max(1, ceil(self.page_s / gain_s))  # the last page may be nearly empty

    def __str__(self) -> str:
        moved, computed = self.page_s / self.page_size, self.token_s
        return f"{moved * 1e6:.3g} µs a token to move, {computed * 1e6:.3g} µs to compute it again"


def with_host_pages(plan: PipelinePlan, facts: KvHostFacts) -> PipelinePlan:
    """`plan` with pages in host memory, where they are asked for or worth it; notes why.

    Raises:
        PlanError: `memory.kv_host_bytes` is less than a page, more than the hosts have, or asked
            for with a cache that has no pages.
    """
    asked = facts.decisions.config.memory.kv_host_bytes
    if asked == 0 or any(stage.kv_in_host is not None for stage in plan.stages):
        return plan
    if isinstance(asked, int):
        _check(plan, facts, asked)
    num_pages, reason, costs = _choice(plan, facts, asked)
    if not reason:
        return plan
    size = gib(num_pages * facts.page_bytes) if num_pages else "0"
    facts.decisions.note(_SETTING, size, reason)
    return replace(
        plan,
        num_host_pages=num_pages,
        min_saved_tokens=(costs.min_saved_tokens if costs else None) or 1,
        moved_page_s=costs.page_s if costs else 0.0,
        resolved=tuple(facts.decisions.notes),
    )


def _choice(
    plan: PipelinePlan, facts: KvHostFacts, asked: int | str
) -> tuple[int, str, _Costs | None]:
    """Pages, the reason (empty: nothing to say), and what it goes by; None: there are no pages."""
    demand, is_asked = facts.demand, isinstance(asked, int)
    most = demand.num_sequences * demand.pages_per_sequence
    if plan.kv_cache != "paged" or plan.num_kv_pages >= demand.useful_pages:
        held = "none are needed: the cache holds all that the run's sequences can use"
        return 0, held if is_asked else "", None
    if not is_asked and plan.device == "cpu":
        return 0, "", None  # the cache itself is in host memory: it may as well be larger
    costs = _costs(plan, facts)
    min_saved_tokens = costs.min_saved_tokens
    if min_saved_tokens is None or min_saved_tokens >= demand.longest_tokens:
        return 0, f"preempted sequences are computed anew, which is cheaper: {costs}", None
    if isinstance(asked, int):
        num_pages = min(asked // facts.page_bytes, most)
    else:
        num_pages, refusal = _worthwhile_pages(plan, facts, costs)
        if refusal:
            return 0, refusal, None
    reason = (
        f"{num_pages} pages for preempted sequences of at least {min_saved_tokens} tokens in the "
        f"cache: {costs}"
    )
    return num_pages, reason, costs


def _worthwhile_pages(plan: PipelinePlan, facts: KvHostFacts, costs: _Costs) -> tuple[int, str]:
    """Those that the run is likely to use; or why none are worth it."""
    if not facts.growth:
        return 0, "preempted sequences are computed anew: how many there will be is not known"
    likely = int(_HOST_PAGES_SHARE * facts.growth * plan.num_kv_pages) + 1
    num_pages = min(likely, _room_pages(plan, facts))
    if num_pages < 1:
        return 0, "the hosts have no memory to spare for pages of preempted sequences"
    gain_s = facts.num_preempted_tokens * (costs.token_s - costs.page_s / costs.page_size)
    pin_s = num_pages * facts.page_bytes / PIN_BYTES_PER_S
    if gain_s <= pin_s:
        spared = f"moving their pages would spare {gain_s:.3g} s, and pinning "
        spared += f"{gib(num_pages * facts.page_bytes)} for them takes about {pin_s:.3g} s"
        return 0, f"preempted sequences are computed anew: {spared}"
    return num_pages, ""


# ---- what there is -------------------------------------------------------------------------------


def _check(plan: PipelinePlan, facts: KvHostFacts, asked: int) -> None:
    if plan.kv_cache != "paged":
        raise PlanError(
            f"{_SETTING} = {asked} ({gib(asked)}) needs pages, and memory.kv_cache = "
            f'"{plan.kv_cache}" has none: set {_SETTING} = 0, or memory.kv_cache = "paged"'
        )
    if asked < facts.page_bytes:
        raise PlanError(
            f"{_SETTING} = {asked} ({gib(asked)}) holds no page: one of {plan.page_size_tokens} "
            f"tokens takes {gib(facts.page_bytes)} on the stage with most layers; set {_SETTING} "
            f"to at least {facts.page_bytes}, or to 0 for none"
        )
    for rank, stage, need in zip(facts.ranks, _by_rank(plan), facts.needs, strict=True):
        left = _left_bytes(plan, facts, rank, stage, need, most=True)
        if asked > left:
            raise PlanError(
                f"{_SETTING} = {asked} ({gib(asked)}), but rank {rank.rank} on {rank.host} has "
                f"only {gib(max(0, left))} of its host's memory left beside "
                f"{_held(plan)}: lower {_SETTING}, or use more hosts"
            )


def _held(plan: PipelinePlan) -> str:
    if plan.device == "cpu":
        return "weights and KV cache"
    return "offloaded weights and what its libraries take"


def _room_pages(plan: PipelinePlan, facts: KvHostFacts) -> int:
    """That every rank has room for by itself."""
    rows = zip(facts.ranks, _by_rank(plan), facts.needs, strict=True)
    return min(
        max(0, _left_bytes(plan, facts, rank, stage, need, most=False)) // need.page_bytes
        for rank, stage, need in rows
    )


def _by_rank(plan: PipelinePlan) -> list[StagePlan]:
    """The stage of each rank, in the order of stages and their lanes."""
    return [stage for stage in plan.stages for _ in stage.ranks]


def _left_bytes(
    plan: PipelinePlan,
    facts: KvHostFacts,
    rank: RankResources,
    stage: StagePlan,
    need: RankMemory,
    *,
    most: bool,
) -> int:
    """Of the rank's share of its host's memory; `most`: all of it, else what may be taken unasked.

    May be negative.
    """
    room = kv_host_room(rank, facts.ranks, on_gpus=plan.device == "cuda", most=most)
    if plan.device == "cpu":
        return room - stage.device_weight_bytes - plan.num_kv_pages * need.page_bytes
    return room - (0 if stage.offload is None else stage.offload.host_bytes)


# ---- what is cheaper -----------------------------------------------------------------------------


def _costs(plan: PipelinePlan, facts: KvHostFacts) -> _Costs:
    rooms = rank_rooms(
        facts.decisions.config.memory,
        facts.ranks,
        facts.world,
        on_gpus=plan.device == "cuda",
        num_threads=plan.threads_per_rank,
    )
    token_s = page_s = 0.0
    for stage, room, need in zip(_by_rank(plan), rooms, facts.needs, strict=True):
        token_s = max(token_s, _token_s(plan, facts.spec, stage, room.speed))
        share = _WAITED_SHARE if plan.device == "cuda" else 1.0
        page_s = max(page_s, 2 * share * need.page_bytes / room.speed.rates.host_bytes_per_s)
    return _Costs(token_s, page_s, plan.page_size_tokens)


def _token_s(plan: PipelinePlan, spec: ModelSpec, stage: StagePlan, speed: StageSpeed) -> float:
    """Of a full step of prompt chunks, whose attention is left out; with what it brings."""
    rows = plan.max_tokens_per_step
    layer = layer_decode_cost(spec, plan.dtype, num_sequences=rows, context_tokens=0.0)
    step_s = stage.num_layers * layer.seconds(speed.ceilings)
    if stage.offload is not None:
        step_s = max(step_s, stage.offload.forecast.link_s, stage.offload.forecast.disk_s)
    return step_s / rows
