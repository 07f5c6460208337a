"""Step times interpolated from measured profiles: `StepTimes` of ranks that were measured.

A time between two measured sizes lies on the line between theirs; beyond the largest the line goes
on, below the smallest the time stays. In two sizes (tokens, and the keys that each sees): first
over keys, then over tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpipipe.planning.cost import dtype_bytes
from mpipipe.planning.plan import PipelinePlan, StagePlan
from mpipipe.planning.profile import HopPoint, Profile, RowPoint, StepPart, TokenPoint
from mpipipe.planning.rate_times import with_offload
from mpipipe.planning.step_times import StepTimes

__all__ = ["Curve", "ProfileTimes"]


class Curve:
    """Seconds over a size, from points in any order; of points of one size the last counts."""

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        found = sorted(dict(points).items())
        assert found, "a curve has a point"
        self._sizes = [size for size, _ in found]
        self._seconds = [seconds for _, seconds in found]

    def at(self, size: float) -> float:
        """Seconds of `size`."""
        sizes, seconds = self._sizes, self._seconds
        if size <= sizes[0] or len(sizes) == 1:
            return seconds[0]
        right = min(bisect_left(sizes, size), len(sizes) - 1)
        slope = (seconds[right] - seconds[right - 1]) / (sizes[right] - sizes[right - 1])
        if size > sizes[right]:  # a larger step takes no less
            slope = max(slope, 0.0)
        return seconds[right] + slope * (size - sizes[right])


def _of_rows(points: Iterable[RowPoint]) -> Curve:
    return Curve((point.rows, point.seconds) for point in points)


class _Layer:
    """Seconds of a layer over tokens and keys."""

    def __init__(self, points: Iterable[TokenPoint]) -> None:
        by_tokens: dict[int, list[tuple[float, float]]] = {}
        for point in points:
            by_tokens.setdefault(point.tokens, []).append((point.context_tokens, point.seconds))
        self._curves = {tokens: Curve(found) for tokens, found in by_tokens.items()}
        # Of sizes that were timed with one number of keys: what a key more costs a token elsewhere.
        self._slope = _key_seconds(by_tokens)
        self._single = {t: found[0][0] for t, found in by_tokens.items() if len(found) == 1}

    def at(self, tokens: float, context_tokens: float) -> float:
        seconds = {
            size: max(0.0, curve.at(context_tokens) + self._beyond(size, context_tokens))
            for size, curve in self._curves.items()
        }
        return Curve(seconds.items()).at(tokens)

    def _beyond(self, tokens: int, context_tokens: float) -> float:
        if tokens not in self._single:
            return 0.0
        return self._slope * tokens * (context_tokens - self._single[tokens])


def _key_seconds(by_tokens: Mapping[int, list[tuple[float, float]]]) -> float:
    """Of one key more for one token, by the largest step that was timed with several numbers."""
    for tokens, points in sorted(by_tokens.items(), reverse=True):
        (fewest, least_s), (most, most_s) = min(points), max(points)
        if most > fewest:
            return max(0.0, most_s - least_s) / (most - fewest) / tokens
    return 0.0


@dataclass(frozen=True, slots=True)
class _Part:
    """The curves of one kind of step."""

    layer: _Layer
    step: Curve
    head: Curve
    embedding: Curve

    @staticmethod
    def of(part: StepPart) -> _Part:
        curves = (_of_rows(points) for points in (part.step, part.head, part.embedding))
        return _Part(_Layer(part.layer), *curves)

    def seconds(self, stage: StagePlan, tokens: float, context_tokens: float) -> float:
        """Of a step without the head."""
        beside_s = self.step.at(tokens) + stage.has_embedding * self.embedding.at(tokens)
        return stage.num_layers * self.layer.at(tokens, context_tokens) + beside_s


class ProfileTimes:
    """`StepTimes` of ranks with profiles.

    Args:
        plan: whose stages are asked for.
        profiles: by rank, of every rank of the plan.
        rates: for links that were not measured.
    """

    def __init__(
        self, plan: PipelinePlan, profiles: Mapping[int, Profile], rates: StepTimes
    ) -> None:
        made: dict[str, tuple[_Part, _Part]] = {}
        for profile in profiles.values():
            if profile.key.digest not in made:
                made[profile.key.digest] = (_Part.of(profile.decode), _Part.of(profile.prefill))
        self._parts = {rank: made[profile.key.digest] for rank, profile in profiles.items()}
        self._row_bytes = plan.hidden_size * dtype_bytes(plan.dtype)
        self._rates = rates
        hops = [hop for profile in profiles.values() for hop in profile.hops]
        self._hops = {crosses: _hop_curve(hops, crosses) for crosses in (False, True)}
        days = sorted({profile.measured[:10] for profile in profiles.values()})
        devices = dict.fromkeys(profile.key.device for profile in profiles.values())
        self.source = f"measured {', '.join(days)} on {', '.join(devices)}"

    def decode_s(self, stage: StagePlan, rows: float, context_tokens: float) -> float:
        """See `StepTimes`."""
        decode, _ = self._parts[stage.rank]
        seconds = decode.seconds(stage, rows, context_tokens)
        seconds += decode.head.at(rows) if stage.has_head else 0.0
        return with_offload(stage.offload, seconds, rows)

    def prefill_s(self, stage: StagePlan, tokens: int, context_tokens: float) -> float:
        """See `StepTimes`. The head computes the last token of each prompt, as in decode steps."""
        decode, prefill = self._parts[stage.rank]
        seconds = prefill.seconds(stage, tokens, context_tokens)
        if stage.has_head:
            prompts = tokens / max(1.0, 2 * context_tokens)
            seconds += decode.head.at(max(1.0, prompts))
        return with_offload(stage.offload, seconds, tokens)

    def hop_s(self, rows_or_tokens: int, crosses_hosts: bool) -> float:
        """See `StepTimes`."""
        curve = self._hops[crosses_hosts]
        if curve is None:
            return self._rates.hop_s(rows_or_tokens, crosses_hosts)
        return curve.at(rows_or_tokens * self._row_bytes)


def _hop_curve(hops: Iterable[HopPoint], crosses_hosts: bool) -> Curve | None:
    """Over bytes, the mean of all pairs; None: no such link was measured."""
    by_size: dict[int, list[float]] = {}
    for hop in hops:
        if hop.crosses_hosts == crosses_hosts:
            by_size.setdefault(hop.num_bytes, []).append(hop.seconds)
    if not by_size:
        return None
    return Curve((size, sum(seconds) / len(seconds)) for size, seconds in by_size.items())
