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
from mpipipe.planning.rate_times import RateTimes, with_offload

__all__ = ["Curve", "ProfileTimes", "profile_times"]


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds over a size."""

    sizes: tuple[float, ...]  # ascending
    seconds: tuple[float, ...]

    @staticmethod
    def of(points: Iterable[tuple[float, float]]) -> Curve:
        """From (size, seconds) in any order; of points of one size the last counts."""
        found = sorted(dict(points).items())
        assert found, "a curve has a point"
        return Curve(tuple(size for size, _ in found), tuple(seconds for _, seconds in found))

    def at(self, size: float) -> float:
        """Seconds of `size`."""
        sizes, seconds = self.sizes, self.seconds
        if size <= sizes[0] or len(sizes) == 1:
            return seconds[0]
        right = min(bisect_left(sizes, size), len(sizes) - 1)
        slope = (seconds[right] - seconds[right - 1]) / (sizes[right] - sizes[right - 1])
        if size > sizes[right]:  # a larger step takes no less
            slope = max(slope, 0.0)
        return seconds[right] + slope * (size - sizes[right])


def _of_rows(points: Iterable[RowPoint]) -> Curve:
    return Curve.of((point.rows, point.seconds) for point in points)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Seconds of a layer over tokens and keys."""

    curves: Mapping[int, Curve]  # over keys, by tokens
    # Of sizes that were timed with one number of keys: what a key more costs a token elsewhere.
    key_s: float

    @staticmethod
    def of(points: Iterable[TokenPoint]) -> _Layer:
        by_tokens: dict[int, list[tuple[float, float]]] = {}
        for point in points:
            by_tokens.setdefault(point.tokens, []).append((point.context_tokens, point.seconds))
        curves = {tokens: Curve.of(found) for tokens, found in by_tokens.items()}
        return _Layer(curves, _key_seconds(curves))

    def at(self, tokens: float, context_tokens: float) -> float:
        seconds = {
            size: max(0.0, curve.at(context_tokens) + self._beyond(size, context_tokens))
            for size, curve in self.curves.items()
        }
        return Curve.of(seconds.items()).at(tokens)

    def _beyond(self, tokens: int, context_tokens: float) -> float:
        timed = self.curves[tokens].sizes
        return self.key_s * tokens * (context_tokens - timed[0]) if len(timed) == 1 else 0.0


def _key_seconds(curves: Mapping[int, Curve]) -> float:
    """Of one key more for one token, by the largest step that was timed with several numbers."""
    for tokens, curve in sorted(curves.items(), reverse=True):
        if len(curve.sizes) > 1:
            more_s = max(0.0, curve.seconds[-1] - curve.seconds[0])
            return more_s / (curve.sizes[-1] - curve.sizes[0]) / tokens
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
        return _Part(_Layer.of(part.layer), *curves)

    def seconds(self, stage: StagePlan, tokens: float, context_tokens: float) -> float:
        """Of a step without the head."""
        beside_s = self.step.at(tokens) + stage.has_embedding * self.embedding.at(tokens)
        return stage.num_layers * self.layer.at(tokens, context_tokens) + beside_s


@dataclass(frozen=True, slots=True)
class ProfileTimes:
    """`StepTimes` of ranks with profiles; made by `profile_times`."""

    parts: Mapping[int, tuple[_Part, _Part]]  # of decode and of prefill steps, by rank
    hops: Mapping[bool, Curve | None]  # over bytes, by whether hosts are crossed
    row_bytes: int  # of a hidden state
    rates: RateTimes  # for links that were not measured, sums of lanes, and pages in host memory
    source: str

    def decode_s(self, stage: StagePlan, rows: float, context_tokens: float) -> float:
        """See `StepTimes`."""
        decode, _ = self.parts[stage.rank]
        seconds = decode.seconds(stage, rows, context_tokens)
        seconds += decode.head.at(rows) if stage.has_head else 0.0
        seconds += self.rates.lanes_s(stage, rows, rows)
        in_host_s = self.rates.kv_in_host_s(stage, rows * context_tokens)
        return with_offload(stage.offload, seconds, rows) + in_host_s

    def prefill_s(self, stage: StagePlan, tokens: int, context_tokens: float) -> float:
        """See `StepTimes`. The head computes the last token of each prompt, as in decode steps."""
        decode, prefill = self.parts[stage.rank]
        seconds = prefill.seconds(stage, tokens, context_tokens)
        prompts = max(1.0, tokens / max(1.0, 2 * context_tokens))
        seconds += decode.head.at(prompts) if stage.has_head else 0.0
        seconds += self.rates.lanes_s(stage, tokens, prompts)
        in_host_s = self.rates.kv_in_host_s(stage, 2 * tokens)
        return with_offload(stage.offload, seconds, tokens) + in_host_s

    def hop_s(self, rows_or_tokens: int, crosses_hosts: bool) -> float:
        """See `StepTimes`."""
        curve = self.hops[crosses_hosts]
        if curve is None:
            return self.rates.hop_s(rows_or_tokens, crosses_hosts)
        return curve.at(rows_or_tokens * self.row_bytes)


def profile_times(
    plan: PipelinePlan, profiles: Mapping[int, Profile], rates: RateTimes
) -> ProfileTimes:
    """The times of `plan`, all of whose ranks have profiles; `rates` for links without."""
    distinct = {profile.key.digest: profile for profile in profiles.values()}
    parts = {
        digest: (_Part.of(profile.decode), _Part.of(profile.prefill))
        for digest, profile in distinct.items()
    }
    hops = [hop for profile in distinct.values() for hop in profile.hops]
    days = sorted({profile.measured[:10] for profile in distinct.values()})
    devices = dict.fromkeys(profile.key.device for profile in distinct.values())
    return ProfileTimes(
        parts={rank: parts[profile.key.digest] for rank, profile in profiles.items()},
        hops={crosses: _hop_curve(hops, crosses) for crosses in (False, True)},
        row_bytes=plan.hidden_size * dtype_bytes(plan.dtype),
        rates=rates,
        source=f"measured {', '.join(days)} on {', '.join(devices)}",
    )


def _hop_curve(hops: Iterable[HopPoint], crosses_hosts: bool) -> Curve | None:
    """Over bytes, the mean of all pairs; None: no such link was measured."""
    by_size: dict[int, list[float]] = {}
    for hop in hops:
        if hop.crosses_hosts == crosses_hosts:
            by_size.setdefault(hop.num_bytes, []).append(hop.seconds)
    if not by_size:
        return None
    return Curve.of((size, sum(seconds) / len(seconds)) for size, seconds in by_size.items())
