"""Which prompts of a batch begin alike, before any of them runs: who should run together. Pure.

Prompts that begin with the same whole pages can share them (`scheduler.shared_prefixes`) while they
are in memory. So those that do are put behind the first of them, and prompts with most of their
tokens in common are a group, for one replica. Prompts that begin like no other keep their order.

Prompts are token ids, or text where the ids are not known yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.planning.padding import MIN_SPARED_TOKENS_GPU
from mpipipe.planning.plan import Decisions, PipelinePlan
from mpipipe.planning.step_limits import StepLimits
from mpipipe.planning.workload import Workload

__all__ = ["PrefixGroups", "max_sharing_tokens", "prefix_groups", "with_prefixes_read_once"]

Prompt = tuple[int, ...] | bytes

_GROUP_PART = 0.5  # of its tokens that the prompts of a group have in common, at least


def max_sharing_tokens(decisions: Decisions, spec: ModelSpec, limits: StepLimits) -> int:
    """`PipelinePlan.max_sharing_tokens`; the contiguous cache has no pages to share."""
    memory, limit = decisions.config.memory, spec.rotary.max_equal_tokens
    if not memory.share_prefixes or memory.kv_cache != "paged":
        return 0
    if limit is None or limit >= limits.max_context_tokens:
        return limits.max_context_tokens
    decisions.note(
        "memory.share_prefixes",
        f"up to {limit} tokens",
        f"the rotary embedding ({spec.rotary.kind}) of longer prompts depends on how long they are",
    )
    return limit


def with_prefixes_read_once(
    plan: PipelinePlan, decisions: Decisions, workload: Workload
) -> PipelinePlan:
    """`plan` with `read_prefixes_once` as its GPUs do; notes why not where pages are shared.

    A CPU needs no telling: its attention looks at the pages of each step.
    """
    asked = decisions.config.memory.read_prefixes_once
    if not asked or plan.device != "cuda" or not plan.max_sharing_tokens:
        return plan
    reason = ""
    num_shared = workload.shared_ratio * sum(prompt for prompt, _ in workload.lengths)
    if plan.attention != "triton":
        reason = f"{plan.attention} attention reads the pages of each row; triton could do it"
    elif workload.lengths and num_shared < MIN_SPARED_TOKENS_GPU:  # no group can spare as many
        reason = "the prompts have too little in common for the CUDA graphs that it takes"
    if not reason:
        return replace(plan, read_prefixes_once=True)
    decisions.note("memory.read_prefixes_once", "false", reason)
    return replace(plan, resolved=tuple(decisions.notes))


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """The prompts of a batch, by their numbers there."""

    groups: tuple[tuple[int, ...], ...]  # each prompt in one
    num_common: tuple[int, ...]  # of each group, the elements with which all of it begin
    num_shared: int  # elements with which prompts begin as earlier ones do, in whole pages

    @property
    def order(self) -> list[int]:
        """Sharers one behind the other."""
        return [number for group in self.groups for number in group]


def prefix_groups(prompts: Sequence[Prompt], page_size: int) -> PrefixGroups:
    """Groups in the order of their first prompts, from the root of the trie of all pages.

    A prompt that begins like no other costs a look at its first page.

    Args:
        prompts: of a batch, in the order in which they would run.
        page_size: in elements of a prompt.
    """
    if len({prompt[:page_size] for prompt in prompts}) == len(prompts):
        alone = tuple([(number,) for number in range(len(prompts))])
        return PrefixGroups(alone, (0,) * len(prompts), 0)
    groups: list[tuple[int, ...]] = []
    num_common: list[int] = []
    num_shared = 0
    # Prompts that have so many pages in common; whether they are in a group already.
    nodes = [(list(range(len(prompts))), 0, False)]
    while nodes:
        members, depth_before, in_group = nodes.pop()
        if len(members) < 2:
            if not in_group:
                groups.append(tuple(members))
                num_common.append(0)
            continue
        depth = _num_common([prompts[member] for member in members], depth_before, page_size)
        num_shared += (len(members) - 1) * (depth - depth_before) * page_size
        num_tokens = sum(len(prompts[member]) for member in members)
        if not in_group and depth * page_size * len(members) >= _GROUP_PART * num_tokens:
            groups.append(tuple(members))
            num_common.append(depth * page_size)
            in_group = True
        parts: dict[Prompt | int, list[int]] = {}
        for member in members:
            page = _page(prompts[member], depth, page_size)
            # The last token of a prompt is always computed, so its page is not shared.
            is_last = (depth + 1) * page_size >= len(prompts[member])
            parts.setdefault(-1 - member if is_last else page, []).append(member)
        nodes.extend((part, depth, in_group) for part in reversed(parts.values()))
    return PrefixGroups(tuple(groups), tuple(num_common), num_shared)


def _num_common(prompts: Sequence[Prompt], num_known: int, page_size: int) -> int:
    """Pages that all of them begin with and can share; `num_known` of these are known."""
    first, begin = prompts[0], num_known * page_size
    depth = min(max(0, len(prompt) - 1) // page_size for prompt in prompts)
    common = first[begin : depth * page_size]
    for prompt in prompts:
        if prompt[begin : depth * page_size] == common:
            continue
        depth = num_known
        while _page(first, depth, page_size) == _page(prompt, depth, page_size):
            depth += 1
        common = first[begin : depth * page_size]
    return depth


def _page(prompt: Prompt, number: int, page_size: int) -> Prompt:
    return prompt[number * page_size : (number + 1) * page_size]
