"""What offload costs, and what would make it less, each tried in the same search.

Pure; nothing here changes a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpipipe.planning.memory import gib
from mpipipe.planning.offload_search import Candidate, OffloadProblem, best_candidate, candidate_of
from mpipipe.planning.placement import ModelParts, part_bytes
from mpipipe.planning.plan import StepForecast

__all__ = ["figure", "offload_advice", "offload_cost"]

_LEAST_SLOWDOWN = 1.05  # by offload; there is nothing to avoid in less
_MOST_STAGES = 4  # to add: a run that needs more needs other hardware
_LEAST_GAIN = 1.03  # in tokens per second; a smaller one is within what predictions are worth


def offload_advice(problem: OffloadProblem, chosen: Candidate) -> list[str]:
    """Clauses, best first; empty: nothing that was tried would help, or there is no need."""
    if _slowdown([choice.forecast for choice in chosen.stages]) < _LEAST_SLOWDOWN:
        return []
    clauses = (_int8(problem, chosen), _more_stages(problem, chosen))
    return [clause for clause in clauses if clause]


def offload_cost(forecasts: Sequence[StepForecast]) -> str:
    """What offload costs a step, in words; `forecasts`: of the stages that are offloaded."""
    slowdown = _slowdown(forecasts)
    if slowdown < _LEAST_SLOWDOWN:
        return "steps hardly longer"
    return f"steps {figure(slowdown)} times as long"


def _slowdown(forecasts: Sequence[StepForecast]) -> float:
    """Of the slowest stage, against devices that held all weights."""
    slowest = max(forecast.step_s for forecast in forecasts)
    return slowest / max(forecast.compute_s for forecast in forecasts)


def _int8(problem: OffloadProblem, chosen: Candidate) -> str:
    model = problem.model
    if model.spec.quantized != "none":
        return ""
    spec = replace(model.spec, quantized="int8")
    narrow = ModelParts(spec, model.dtype, part_bytes(spec, model.dtype))
    narrowed = replace(problem, model=narrow)
    resident = _best_resident(narrowed)
    if resident is not None and _is_faster(resident, chosen):
        return f'model.quantize = "int8" fits without offload, {_gain(resident, chosen)}'
    found = best_candidate(narrowed)
    if found is None or not _is_faster(found, chosen):
        return ""
    brought = f"{gib(found.streamed_bytes)} instead of {gib(chosen.streamed_bytes)} a step"
    return f'model.quantize = "int8" would bring {brought}, {_gain(found, chosen)}'


def _more_stages(problem: OffloadProblem, chosen: Candidate) -> str:
    """With ranks like the one that has most, on hosts of their own."""
    if problem.fixed_split is not None:
        return ""
    roomiest = max(problem.rooms, key=lambda room: room.device_bytes)
    num_stages = len(problem.rooms)
    for more in range(1, _MOST_STAGES + 1):
        if num_stages + more > problem.model.spec.num_layers:
            break
        total = num_stages + more
        rows = -(-chosen.rows * num_stages // total)
        wider = replace(
            problem, rooms=(*problem.rooms, *[roomiest] * more), num_slots=problem.num_slots + more
        )
        found = candidate_of(wider, rows, max(rows, chosen.tokens))
        if found is not None and found.is_resident and _is_faster(found, chosen):
            stages = "one more stage" if more == 1 else f"{more} more stages"
            return f"{stages} of this kind would hold all of it, {_gain(found, chosen)}"
    return ""


def _is_faster(found: Candidate, chosen: Candidate) -> bool:
    return found.tokens_per_s >= _LEAST_GAIN * chosen.tokens_per_s


def _best_resident(problem: OffloadProblem) -> Candidate | None:
    """The fastest candidate that offloads nothing; None: there is none."""
    resident = [
        found
        for tokens in problem.tokens
        for rows in problem.rows
        if rows <= tokens
        and (found := candidate_of(problem, rows, tokens)) is not None
        and found.is_resident
    ]
    return max(resident, key=lambda found: found.tokens_per_s, default=None)


def _gain(found: Candidate, chosen: Candidate) -> str:
    """A ratio: the search knows no measured times, and the forecast of the job goes by them."""
    return f"{found.tokens_per_s / chosen.tokens_per_s:.2f} times as fast"


def figure(value: float) -> str:
    """Three digits at least, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
