"""Drafts by n-gram lookup: whether a run has them, and at what cost by its step times. Pure.

A step that verifies drafts reads the weights once for all of its rows, as any decode step; with few
rows it takes hardly longer for it. `scheduler.drafts` weighs that against how often a sequence's
text is foreseen.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import AUTO, Config
from mpipipe.planning.plan import DraftPlan, PipelinePlan, Resolved
from mpipipe.planning.step_limits import row_buckets
from mpipipe.planning.step_times import StepTimes

__all__ = ["with_drafts"]

_SETTING = "pipeline.num_speculative_tokens"
# With a row for the last token a graph of 8. Text that is foreseen for longer gains little more.
_TOKENS = 7
# Of a step with drafts of several sequences; graphs of more rows are made for full batches only.
_MOST_ROWS = 64
# Steps that are sent ahead hide what lies between a token and the step that it goes into: ids to
# the host, scheduler, message, launch. Measured on two H100: 260 to 530 µs on the first stage.
_AWAITED_S = 0.4e-3
_LEAST_GAIN = 1.3  # with every draft right; below that hardly any text gains
_CONTEXTS = (64.0, 1024.0)  # between which the cost of a token in the cache is taken


def with_drafts(
    plan: PipelinePlan, config: Config, spec: ModelSpec, times: StepTimes
) -> PipelinePlan:
    """`plan` with drafts, where they are asked for or may gain; notes why.

    Args:
        plan: without.
        config: what is asked for.
        spec: of the model.
        times: of the plan's steps.
    """
    asked = config.pipeline.num_speculative_tokens
    if asked == 0:
        return plan
    reason = _obstacle(plan)
    if not reason and asked == AUTO and spec.num_experts > 1:
        reason = "every row of a step has experts of its own to read"
    num_tokens = min(_TOKENS if asked == AUTO else int(asked), plan.max_tokens_per_step - 1)
    if not reason and num_tokens < 1:
        reason = f"pipeline.max_tokens_per_step = {plan.max_tokens_per_step} has no room for any"
    if reason:
        return _noted(plan, 0, f"no drafts: {reason}")
    drafts = _draft_plan(plan, num_tokens, times)
    gain, num_rows = _best_gain(drafts)
    told = f"a step of {num_rows} rows makes up to {gain:.1f} times the tokens of steps of one row"
    if asked == AUTO and gain < _LEAST_GAIN:
        return _noted(plan, 0, f"no drafts: {told} in the same time, as predicted")
    told = f"where text recurs {told} in the same time, as predicted; forecasts do not count that"
    return replace(_noted(plan, num_tokens, told), drafts=drafts)


def _obstacle(plan: PipelinePlan) -> str:
    """What rules drafts out, whether they are asked for or not; empty: nothing."""
    if plan.kv_cache != "paged":
        return f'with memory.kv_cache = "{plan.kv_cache}" a refused draft cannot be taken back'
    if not plan.sampling.plain:
        return "every prompt draws its tokens, or has penalties or log-probabilities"
    return ""


def _noted(plan: PipelinePlan, num_tokens: int, reason: str) -> PipelinePlan:
    note = Resolved(_SETTING, str(num_tokens), reason)
    return replace(plan, resolved=(*plan.resolved, note))


# While a slot awaits its ids, the queue of a GPU of the first stage stands at their receive
# (`stage.worker`): steps of other slots would come behind it, and stages would take turns. On CPUs
# ids come beside the steps.


def _draft_plan(plan: PipelinePlan, num_tokens: int, times: StepTimes) -> DraftPlan:
    most_rows = max(min(plan.max_sequences_per_slot, _MOST_ROWS), 1 + num_tokens)
    rows = row_buckets(most_rows)
    short_s, long_s = (_step_s(plan, times, 1, context) for context in _CONTEXTS)
    key_s = max(0.0, long_s - short_s) / (_CONTEXTS[1] - _CONTEXTS[0])
    return DraftPlan(
        max_tokens=num_tokens,
        rows=rows,
        step_s=tuple(_step_s(plan, times, count, 0.0) for count in rows),
        key_s=key_s,
        awaited_s=_AWAITED_S if plan.lookahead else 0.0,
        alone=plan.lookahead > 0 and plan.num_slots > 1,
    )


def _step_s(plan: PipelinePlan, times: StepTimes, num_rows: int, context: float) -> float:
    """Of a decode step through all stages."""
    compute_s = sum(times.decode_s(stage, num_rows, context) for stage in plan.stages)
    hops = pairwise(stage.host for stage in plan.stages)
    return compute_s + sum(times.hop_s(num_rows, sender != receiver) for sender, receiver in hops)


def _best_gain(drafts: DraftPlan) -> tuple[float, int]:
    """Of one sequence with an empty cache, all of whose drafts are right; with how many rows."""
    gains = [
        (min(num_rows, 1 + drafts.max_tokens) * drafts.step_s[0] / (step_s + drafts.awaited_s))
        for num_rows, step_s in zip(drafts.rows, drafts.step_s, strict=True)
    ]
    best = max(range(len(gains)), key=gains.__getitem__)
    return gains[best], drafts.rows[best]
